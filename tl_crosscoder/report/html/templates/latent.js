// One latent: measures, firing, logits, examples, samples. Made when it is opened.
const MEASURES = [
  "attribution", "attribution_share", "score", "relative_decoder_norm", "delta_norm", "decoder_cosine",
  "explained_difference", "explained_difference_drop", "active_share", "template_share",
];

const fact = (key, shown, name) => el("div", {}, el("dt", {}, termLink(key, name)), el("dd", { text: shown }));

const measures = (record) => el("dl", { class: "facts" },
  ...MEASURES.filter((key) => record.ranked[key] != null).map((key) => fact(key, inDigits(key, record.ranked[key]))),
  record.encoder_cosine === null ? null : fact("encoder_cosine", inDigits("encoder_cosine", record.encoder_cosine)),
  fact("code", inDigits("code", record.mean_code), "mean activation where active"),
  fact("code", inDigits("code", record.max_code), "max activation"),
  fact("n_active", count(record.ranked.n_active)),
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
    el("td", { text: data.directions[name] ?? name }),
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
    const shift = example.shifts[i] ?? 0;
    const line = Math.abs(shift) < 0.1 ? null : `box-shadow: inset 0 -2px rgba(var(--${shift > 0 ? "hot" : "cold"}), ${Math.min(1, 0.25 + Math.abs(shift) / 4)})`;
    const hints = [code > 0 ? `activation ${code}` : null, example.shifts[i] == null ? null
      : `log-probability, fine-tuned minus base: ${shift > 0 ? "+" : ""}${shift.toFixed(2)} nats`].filter(Boolean);
    return el("span", { text: token, style: [shade, line].filter(Boolean).join("; ") || null, class: i === example.at ? "at" : null, "data-tip": hints.join("; ") || null });
  }));
  const meta = `${number(2)(example.value)} · ${example.source} · ${example.role}`;
  return el("div", { class: "example" }, el("div", { class: "meta", text: meta }), line);
};

const FIFTHS = ["weakest fifth", "second fifth", "middle fifth", "fourth fifth", "strongest fifth"];
const grouped = (record, own) => {
  const groups = new Map();
  for (const example of own) {
    const name = example.quantile === null ? "Largest activations" : `Sample: ${FIFTHS[example.quantile] ?? example.quantile}`;
    groups.set(name, [...(groups.get(name) ?? []), example]);
  }
  return [...groups].flatMap(([name, own]) => [
    el("div", { class: "group", text: name }), ...own.map((example) => exampleOf(example, record.max_code || 1)),
  ]);
};
const strongest = (record) => [
  ...grouped(record, record.examples.filter((example) => example.quantile === null)),
  record.examples.some((example) => example.shifts.length) ? el("p", { class: "note", text: "Shaded by activation. Underlined in orange where fine-tuning makes a token likelier after those before it, in blue where less likely." }) : null,
];
const weaker = (record) => grouped(record, record.examples.filter((example) => example.quantile !== null));

// Counts in bins of equal width; `of` says of what.
const histogram = ({ counts, least, most, n }, of) => {
  const top = Math.max(...counts, 1), at = (i) => number(2)(least + i * (most - least) / counts.length);
  return [
    el("div", { class: "histogram", role: "img", "aria-label": `from ${least} to ${most}, of ${count(n)} ${of}` },
      ...counts.map((own, i) => el("span", {
        style: `height: ${100 * Math.sqrt(own / top)}%`, "data-tip": `${at(i)} to ${at(i + 1)}: ${count(own)} tokens`,
      }))),
    el("p", { class: "note", text: `${least} to ${most}, of ${count(n)} ${of}; heights are square roots of counts.` }),
  ];
};

const latentLink = (latent) => placeOf.has(latent) ? el("a", { href: `#latent-${latent}`, text: latent }) : String(latent);
const similar = (record) => el("p", {}, ...record.similar.flatMap(([latent, cosine], i) =>
  [i ? ", " : "", latentLink(latent), ` (${number(2)(cosine)})`]));

const name = (record) => record.name ? el("p", { class: "named", text: record.name, "data-tip": "Name by a language model, see judge", tabindex: "0" }) : null;
const causes = (record) => !record.changes.length ? null : el("p", { class: "note" },
  ...record.changes.flatMap(([place, n, necessity]) => [
    `One of ${n} latents of change ${place}, which together undo `, termLink("necessity", percent(0)(necessity)), " of it. "]));

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
        : written(`steered × ${data.samples.strengths[s]}`, texts[i], sample.base, "strength")),
      ...written("fine-tuned", sample.finetuned),
      el("dt", {}, termLink("ablation")),
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
      record.is_specific ? el("span", { class: "badge", text: "specific", "data-tip": meaning("is_specific"), tabindex: "0" }) : null,
      el("span", { class: "grow" }),
      el("button", { type: "button", text: favourites.has(record.latent) ? "★" : "☆", "aria-label": "favourite", "aria-pressed": String(favourites.has(record.latent)),
        onclick: () => { toggleFavourite(record.latent); openPane(i); } }),
      step(-1, "←", "previous latent"), step(1, "→", "next latent"),
      el("button", { type: "button", text: "Close", onclick: () => closePane() })),
    name(record),
    causes(record),
    ...section("Examples", "quantile", strongest(record)),
    ...section("Effect on the logits", "logit", record.logits.length ? logits(record) : null,
      record.logit_histogram ? histogram(record.logit_histogram, "tokens of the vocabulary") : null),
    ...section("Activations", "code", record.histogram ? histogram(record.histogram, "held-out tokens") : null),
    ...section("More examples", "quantile", weaker(record)),
    ...section("Steered and ablated", null, i < (data.samples?.latents.length ?? 0) ? samples(i) : null),
    ...section("Active on", "active_share", firing(record.roles), record.sources.length > 1 ? el("div", { class: "group", text: "by source" }) : null,
      record.sources.length > 1 ? firing(record.sources) : null,
      record.positions.length > 1 ? el("div", { class: "group", text: "by position in the context" }) : null,
      record.positions.length > 1 ? firing(record.positions) : null),
    ...section("Measures", null, measures(record)),
    ...section("Decoder norm by site", "decoder_norm", norms(record)),
    ...section("Latent Scaling", null, scaling(record)),
    ...section("Similar latents", "decoder_cosine", record.similar.length ? similar(record) : null),
  ].filter((node) => node !== null);
};
