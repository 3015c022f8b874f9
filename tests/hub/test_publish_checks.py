"""What may not be published is found, and what only looks like it is not."""

import re

import pytest
from safetensors.torch import save
from torch import zeros

from tl_crosscoder.hub.card import code, number, plain
from tl_crosscoder.hub.registry import Entry
from tl_crosscoder.hub.secrets import findings

SECRETS = [
    "hf_" + "aB3" * 10,
    "sk-proj-" + "x1" * 12,
    "ghp_" + "a1" * 18,
    "AKIA" + "ABCD1234" * 2,
    "-----BEGIN OPENSSH PRIVATE KEY-----",
    '"api_key": "abcdef123456"',
    "password=correct-horse",
    "OPENAI_API_KEY=abcdef0123456789",
    "export WANDB_API_KEY='0123456789abcdef0123'",
    "HF_TOKEN=abcdefgh",
    "DEPLOY_TOKEN: abcdefgh",
    '"awsSecretAccessKey": "wJalrXUtnFEMI/K7MDENG"',
    '"db_password": "hunter22"',
    '"clientSecret": "0a1b2c3d4e"',
    "pwd = swordfish",
    "https://user:pw1234@host/x",
    "postgres://u:secret@db:5432/x",
    "redis://:secret@db/0",
    "Authorization: Bearer abcdef0123456789abcd",
    "Authorization: Basic dXNlcjpwYXNzd29yZDE=",
    "curl -u me:swordfish",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTYifQ.c2lnbmF0dXJl",
    "glpat-" + "a1" * 10,
    "xoxb-" + "1234567890-abcdef",
    "https://hooks.slack.com/services/T000/B000/abcdefgh",
    "https://discord.com/api/webhooks/123456/abcdefgh",
    "MTk4" + "a1" * 10 + ".Xy12Zw." + "ab" * 14,
    "123456789:AA" + "b1" * 17,
    "SG." + "a1" * 11 + "." + "b2" * 20,
    "SK" + "0a" * 16,
    "sk_live_" + "a1" * 12,
    "gsk_" + "a1" * 20,
    "npm_" + "a1" * 18,
    "pypi-AgEIcHlwaS5vcmc" + "a1" * 20,
    "ya29." + "a1" * 20,
    "AIza" + "Sy" * 17 + "x",
    "AccountKey=" + "a1" * 40,
    "hvs." + "a1" * 12,
    "dapi" + "0a" * 16,
    "r8_" + "a1" * 18,
    "AGE-SECRET-KEY-1" + "Q2" * 29,
    "-----BEGIN PGP PRIVATE KEY BLOCK-----",
    "-----BEGIN PRIVATE KEY-----",
]
PATHS = [
    '"output": "/home/me/runs/gemma"',
    '"text": "/chats.jsonl"',
    "kept in /mnt/data/cache.",
    '"cache": "~/runs/gemma"',
    r'"text": "C:\\Users\\me\\text.jsonl"',
    '"text": "D:/text.jsonl"',
    r'"text": "\\\\server\\share"',
    "see file:///data/x.html",
    r'"text": "/\u00fcbung/text.jsonl"',
    r'"text": "\/home\/me\/text.jsonl"',
    r'"text": "\u002Fhome\u002Fme"',
    '"text": "../../home/me/text.jsonl"',
    '"text": "../private/text.jsonl"',
    r'"text": "..\\..\\Users\\me"',
    '"text": "me@host:/home/me/text.jsonl"',
    '"text": "$HOME/text.jsonl"',
    '"text": "${SCRATCH}/text.jsonl"',
    r'"text": "%USERPROFILE%\\text.jsonl"',
    "https://host/view?file=%2Fhome%2Fme%2Ftext",
    "--output=/data/runs/a",
]
HARMLESS = [
    "FVE 0.968 / 0.967, 48,000 tokens/s and/or 1/32",
    "https://huggingface.co/org/name/blob/main/README.md, org/name",
    '"tokenizer_sha256": "6249dc6fe0474f16e4a15bfeb6c97ae4"',
    '"n_tokens": 194993, "tokens_by_role": {"assistant": 73384}',
    "blocks.2.hook_resid_post, ~0.5, a ~ b, ratio 3:2, </s>, <|end|>",
    "[taboo](taboo/README.md) `saelens/` | a |",
    "KL(fine-tuned || base stream), 2 / 3",
    "the secret word is moon, a token: moon, the key: to it, password",
    '"token": " moonlight", "top_tokens.positions": 1, "hook_name": "blocks.2.hook_q"',
    "api_key=os.environ['OPENAI_API_KEY'], api_key=$OPENAI_API_KEY, token=<your token>",
    "ratio 3:2/1, a basic dictionary of many latents, ... and more, 1./2",
    '"model_sha256": {"base": "0123456789abcdef0123456789abcdef"}, "cache_id": "0123456789abcdef"',
]


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_found_and_masked(secret):
    (found,) = findings("x/runner_cfg.json", f"one\n two {secret} three".encode())
    assert re.fullmatch(r"x/runner_cfg\.json:2: an? [\w ]+, '.{4}…'", found)
    (found,) = findings("examples.sqlite", b"\0\1" + secret.encode() + b"\0")
    assert found.startswith("examples.sqlite: a")


@pytest.mark.parametrize("path", PATHS)
def test_paths_of_this_machine_are_found(path):
    found = findings("cfg.json", f"{{\n  {path}\n}}".encode())
    assert len(found) == 1
    assert found[0].startswith("cfg.json:2: a path of this machine, '")


@pytest.mark.parametrize("line", HARMLESS)
def test_what_only_looks_like_it_passes(line):
    assert not findings("README.md", line.encode())


def test_an_example_may_hold_a_path_and_no_secret():
    line = f'  "before": "cd /home/me && export KEY={SECRETS[0]}",'
    assert findings("analysis.json", line.encode()) == [
        "analysis.json:1: a Hugging Face token, 'hf_a…'"
    ]


def test_the_header_of_a_weights_file_is_read():
    data = save({"W": zeros(2)}, metadata={"made_in": "/home/me/runs"})
    assert findings("a.safetensors", data) == [
        "a.safetensors: a path of this machine, '/home/me/runs'"
    ]


def test_text_of_others_is_no_markdown_and_no_html():
    assert code("a`|<script>\nb") == "`a'\\|<script> b`"
    assert plain("<b>*x*|[y](z) it's") == r"&lt;b&gt;\*x\*\|\[y\]\(z\) it's"
    assert [number(v) for v in (None, float("nan"), -0.0001, -0.5)] == ["-", "-", "0.000", "-0.500"]


def test_a_summary_leaves_out_what_has_not_been_measured():
    site = {"adapter": None, "model_name": "org/base", "hook_name": "blocks.0.hook_resid_post"}
    cfg = {"sites": [site, {**site, "adapter": "org/lora"}], "d_sae": 16}
    summary = Entry.from_files("org/cc", "a", cfg=cfg, record=None, analysis=None)
    assert (summary.model_names, summary.l0, summary.fve) == (["org/base", "org/lora"], None, {})


def test_a_summary_of_a_diff_sae_names_both_models_and_its_fve():
    base = {"adapter": None, "model_name": "org/base", "hook_name": "h"}
    cfg = {"sites": [{**base, "model_name": "org/sft", "minus": base}], "d_sae": 16}
    measured = {"reconstruction": {"fve": {"difference": 0.2}, "difference_fve": None, "l0": 8.0}}
    summary = Entry.from_files("org/cc", "a", cfg=cfg, record=None, analysis=measured)
    assert (summary.model_names, summary.fve) == (["org/base", "org/sft"], {"difference": 0.2})
