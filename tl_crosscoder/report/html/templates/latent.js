// One latent: measures, firing, logits, examples, samples. Made when it is opened.
const MEASURES = [
  ["score", "score", number(4)], ["R", "relative_decoder_norm", number(3)], ["delta_norm", "delta_norm", number(3)],
  ["cosine", "decoder_cosine", number(3)], ["alone", "explained_difference", percent(2)],
  ["lost", "explained_difference_drop", percent(2)], ["fires", "active_share", percent(2)],
  ["template", "template_share", percent(1)],
];
const SCALED = {
  finetuned: "fine-tuned row", base: "base row", random: "random direction", other: "another latent's row",
};

const fact = (key, shown, name) => el("div", {}, el("dt", {}, termLink(key, name)), el("dd", { text: shown }));

const measures = (record) => el("dl", { class: "facts" },
  ...MEASURES.filter(([, field]) => record.ranked[field] !== null)
    .map(([key, field, show]) => fact(key, show(record.ranked[field]))),
  record.encoder_cosine === null ? null : fact("encoder_cosine", number(3)(record.encoder_cosine)),
  fact("code", number(2)(record.mean_code), "mean code where active"),
  fact("code", number(2)(record.max_code), "largest code"),
  fact("fires", count(record.ranked.n_active), "active tokens"),
);

const bars = (rows) => el("div", { class: "bars" }, ...rows.flatMap(([name, share, shown]) => [
  el("span", { class: "name", text: name }),
  el("span", { class: "track" }, el("div", { class: "fill", style: `width: ${100 * Math.min(1, share)}%` })),
  el("span", { text: shown }),
]));

const norms = (record) => {
  const largest = Math.max(...record.norms.map(([, norm]) => norm), 1e-12);
  return bars(record.norms.map(([site, norm]) => [spoken(site), norm / largest, number(3)(norm)]));
};

const scaling = (record) => record.scaling.length === 0 ? null : el("div", { class: "scroll" }, el("table", {},
  el("thead", {}, el("tr", {}, el("th", { scope: "col", text: "direction" }),
    el("th", { scope: "col", class: "num" }, termLink("nu_error")),
    el("th", { scope: "col", class: "num" }, termLink("nu_reconstruction")))),
  el("tbody", {}, ...record.scaling.map(([name, error, reconstruction]) => el("tr", {},
    el("td", { text: SCALED[name] ?? name }),
    el("td", { class: "num", text: number(2)(error) }), el("td", { class: "num", text: number(2)(reconstruction) })))),
));

const firing = (counts) => {
  const rates = counts.map(([, n, of]) => n / of), largest = Math.max(...rates, 1e-12);
  return bars(counts.map(([name, n, of], i) =>
    [name, rates[i] / largest, `${percent(2)(rates[i])} (${count(n)} of ${count(of)})`]));
};

const READ = { difference: "d¹ - d⁰, fine-tuned" };
const chips = (tokens, colour) => {
  const largest = Math.max(...tokens.map(([, logit]) => Math.abs(logit)), 1e-12);
  return el("div", {}, ...tokens.map(([token, logit]) => el("span", {
    class: "chip", style: `background: rgba(var(--${colour}), ${0.08 + 0.3 * Math.abs(logit) / largest})`,
  }, token, " ", el("small", { text: logit.toFixed(2) }))));
};
const logits = (record) => el("div", { class: "logits" }, ...record.logits.flatMap((l) => {
  const who = READ[l.direction] ?? spoken(l.direction);
  return [
    el("span", { class: "who", text: `${who} promotes` }), chips(l.promoted, "hot"),
    el("span", { class: "who", text: "suppresses" }), chips(l.suppressed, "cold"),
  ];
}));

const exampleOf = (example, largest) => {
  const line = el("div", { class: "tokens", dir: "ltr" }, ...example.tokens.map((token, i) => {
    const code = example.codes[i];
    const shade = code > 0 ? `background: rgba(var(--hot), ${0.12 + 0.58 * Math.min(1, code / largest)})` : null;
    return el("span", { text: token, style: shade, class: i === example.at ? "at" : null, title: code > 0 ? `code ${code}` : null });
  }));
  const meta = `${number(2)(example.value)} · ${example.source} · ${example.role}`;
  return el("div", { class: "example" }, el("div", { class: "meta", text: meta }), line);
};

const FIFTHS = ["weakest fifth", "second fifth", "middle fifth", "fourth fifth", "strongest fifth"];
const examples = (record) => {
  const groups = new Map();
  for (const example of record.examples) {
    const name = example.quantile === null ? "Largest codes" : `Sample: ${FIFTHS[example.quantile] ?? example.quantile}`;
    groups.set(name, [...(groups.get(name) ?? []), example]);
  }
  return [...groups].flatMap(([name, own]) => [
    el("div", { class: "group", text: name }), ...own.map((example) => exampleOf(example, record.max_code || 1)),
  ]);
};

const written = (name, text, plain, key) => [
  el("dt", {}, key ? termLink(key, name) : name),
  el("dd", {}, el("bdi", { text }), text === plain ? el("i", { class: "same", text: "  the same" }) : ""),
];
const samples = (i) => data.samples.prompts.map((sample) => {
  const ablated = sample.ablated[i];
  const isChanged = ablated !== null && ablated !== sample.finetuned;
  const n = sample.n_active[i];
  return el("div", { class: "sample" },
    el("p", { class: "prompt", text: sample.prompt }),
    el("dl", {},
      ...written("base", sample.base),
      ...sample.steered.flatMap((texts, s) => texts[i] === null ? []
        : written(`steered × ${data.samples.strengths[s]}`, texts[i], sample.base, "steering")),
      ...written("fine-tuned", sample.finetuned),
      el("dt", {}, termLink("ablation", "without")),
      isChanged ? el("dd", { class: "changed" }, el("bdi", { text: ablated }))
        : el("dd", { class: "same", text: n ? `the same, though active on ${n} tokens of it` : "the same: active on no token of it" }),
    ));
});

const section = (title, key, ...content) => {
  const kept = content.flat().filter((node) => node !== null);
  if (!kept.length) return [];
  return [el("h3", {}, key ? termLink(key, title) : title), ...kept];
};

const latentPane = (i) => {
  const record = records[i], at = visible.indexOf(i);
  const step = (by, text, label) => el("button", {
    type: "button", text, "aria-label": label, disabled: visible[at + by] === undefined || at < 0, onclick: () => move(by),
  });
  return [
    el("div", { class: "bar" },
      el("h2", { tabindex: "-1", text: `Latent ${record.latent}` }),
      el("span", { class: "badge", text: `# ${record.ranked.place}` }),
      data.compared ? el("span", { class: "badge", text: record.ranked.latent_class }) : null,
      record.is_specific ? el("span", { class: "badge", text: "specific", "data-tip": meaning("specific"), tabindex: "0" }) : null,
      el("span", { class: "grow" }),
      step(-1, "←", "previous latent"), step(1, "→", "next latent"),
      el("button", { type: "button", text: "Close", onclick: () => closePane() })),
    ...section("Measures", null, measures(record)),
    ...section("Decoder norm by site", "norm", norms(record)),
    ...section("Latent Scaling", null, scaling(record)),
    ...section("Fires on", "fires", firing(record.roles), record.sources.length > 1 ? el("div", { class: "group", text: "by source" }) : null,
      record.sources.length > 1 ? firing(record.sources) : null,
      record.positions.length > 1 ? el("div", { class: "group", text: "by position in the context" }) : null,
      record.positions.length > 1 ? firing(record.positions) : null),
    ...section("Effect on the logits", "logits", record.logits.length ? logits(record) : null),
    ...section("Examples", "quantile", examples(record)),
    ...section("Steered and without it", null, data.samples ? samples(i) : null),
  ];
};
