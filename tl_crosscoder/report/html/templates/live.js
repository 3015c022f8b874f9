// Asking the models: a form, what they write, and latents to switch off or to steer by.
const ask = byId("ask"), answer = byId("answer");
const token = new URLSearchParams(location.search).get("token") ?? "";
let edits = { without: [], steered: null, strength: 0 };
let asked = 0;

const question = async (content) => {
  const response = await fetch("answer", {
    method: "POST", headers: { "Content-Type": "application/json", "X-Token": token }, body: JSON.stringify(content),
  });
  if (response.status === 403) throw new Error("The server refused: open the address that it printed.");
  const found = await response.json().catch(() => ({ error: `The server failed (${response.status}); its terminal says why.` }));
  if (found.error) throw new Error(found.error);
  return found;
};

const heat = (kl, largest) => `background: rgba(var(--hot), ${0.6 * Math.min(1, kl / Math.max(largest, 0.1))})`;
const writtenTokens = (found) => {
  const own = found.tokens.slice(found.n_prompt_tokens), largest = Math.max(...found.kl, 0);
  return el("dd", {}, el("div", { class: "tokens", dir: "ltr" }, ...own.map((piece, i) => {
    const behind = found.latents
      .map((row) => [row.latent, row.codes[found.n_prompt_tokens + i - 1]]).filter(([, code]) => code > 0)
      .map(([latent, code]) => `${latent} (${code})`).join(", ");
    const hint = `KL ${found.kl[i].toFixed(3)} nats; active where it is predicted: ${behind || "none of these latents"}`;
    return el("span", { text: piece, style: heat(found.kl[i], largest), tabindex: "0", "data-tip": hint });
  })));
};

const toggled = (latent) => (event) => {
  edits.without = event.target.checked ? [...edits.without, latent] : edits.without.filter((j) => j !== latent);
  again();
};
const latentRow = (row) => {
  const name = placeOf.has(row.latent) ? el("a", { href: `#latent-${row.latent}`, text: row.latent }) : String(row.latent);
  const box = el("input", { type: "checkbox", "aria-label": `without latent ${row.latent}`, checked: edits.without.includes(row.latent) });
  box.addEventListener("change", toggled(row.latent));
  const radio = el("input", { type: "radio", name: "steered", "aria-label": `steer by latent ${row.latent}`, checked: edits.steered === row.latent });
  radio.addEventListener("change", () => { edits.steered = row.latent; again(); });
  return el("tr", {}, el("td", {}, name), el("td", { class: "num", text: fixed(row.attribution, 3) }),
    el("td", { class: "num", text: percent(0)(row.share) }), el("td", {}, box), el("td", {}, radio));
};

const slider = () => {
  const shown = el("span", { text: edits.strength.toFixed(1) });
  const input = el("input", { type: "range", id: "strength", min: "-2", max: "2", step: "0.1", value: String(edits.strength), "aria-label": "strength of steering" });
  input.addEventListener("input", () => { shown.textContent = Number(input.value).toFixed(1); });
  input.addEventListener("change", () => { edits.strength = Number(input.value); again(); });
  return el("label", { class: "slider" }, termLink("strength"), input, shown);
};

const show = (found) => {
  const rows = found.latents.length === 0 ? [el("p", { class: "note", text: found.note })] : [
    el("div", { class: "scroll" }, el("table", { id: "behind" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col", text: "latent" }),
        el("th", { scope: "col", class: "num" }, termLink("attribution")),
        el("th", { scope: "col", class: "num", text: "of the change" }),
        el("th", { scope: "col", text: "off" }), el("th", { scope: "col", text: "steer" }))),
      el("tbody", {}, ...found.latents.map(latentRow)))),
    slider(),
  ];
  answer.replaceChildren(
    el("div", { class: "sample" }, el("dl", {},
      el("dt", { text: "base" }), el("dd", {}, el("bdi", { text: found.base })),
      el("dt", { text: "fine-tuned" }), writtenTokens(found),
      ...(found.edited === null ? [] : [el("dt", { text: "edited" }),
        el("dd", { class: "changed", id: "edited" }, el("bdi", { text: found.edited }),
          found.edited === found.finetuned ? el("i", { class: "same", text: "  the same" }) : "")]))),
    ...rows);
};

const again = async () => {
  const own = ++asked, form = new FormData(ask);
  answer.setAttribute("aria-busy", "true");
  try {
    const found = await question({
      prompt: form.get("prompt"), max_new_tokens: Number(form.get("max_new_tokens")), ...edits,
    });
    if (own === asked) show(found);
  } catch (error) {
    if (own === asked) answer.replaceChildren(el("p", { class: "failed", text: error.message }));
  } finally {
    if (own === asked) answer.removeAttribute("aria-busy");
  }
};

ask.addEventListener("submit", (event) => {
  event.preventDefault();
  edits = { without: [], steered: null, strength: 0 };
  again();
});
