"""Benchmarks of measures and interventions run at a tiny size; numbers are not looked at."""

import pytest

pytestmark = pytest.mark.slow


def test_every_measure_has_a_speed_beside_that_of_encoding(run, capsys):
    run("analysis_speed.py")
    text = capsys.readouterr().out
    for name in ("encode + Latent Scaling ", "encode + examples", "one latent at a time"):
        assert name in text
    assert "patching, eight variants" in text


def test_every_set_of_latents_is_tested(run, tmp_path, capsys):
    run("causal_tests.py", "--organisms", "false-fact", "--runs", tmp_path)
    text = capsys.readouterr().out
    for test in ("necessity", "insert"):
        for name in ("top 3 by score", "top 30 by R"):
            assert f"{test:<10} {name}" in text


def test_verdicts_are_counted_on_null_pairs(run, tmp_path, capsys):
    run("verdict_nulls.py", "--runs", tmp_path)
    text = capsys.readouterr().out
    for on in ("null", "real"):
        assert f"{on} pair, all      found in 0 of 3 verdicts (0.0% [0.0%, 70.8%])" in text
