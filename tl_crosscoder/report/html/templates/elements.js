// The page's data, elements and numbers. All text goes into the page through textContent, never as HTML.
const byId = (id) => document.getElementById(id);
const unpacked = async (node) => {
  const bytes = Uint8Array.from(atob(node.textContent.trim()), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};
if (!("DecompressionStream" in window)) {
  byId("count").textContent = "This browser is too old to show the latents: use one of 2023 or later.";
  return;
}
const data = JSON.parse(await unpacked(byId("data")));
const terms = data.terms;

const el = (tag, options = {}, ...children) => {
  const { text, ...attributes } = options;
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  if (text !== undefined) node.textContent = text;
  node.append(...children.filter((child) => child !== null));
  return node;
};

const favourites = new Set(); // numbers of latents
const NONE = "–";
// Without the sign of a number that is rounded to zero.
const fixed = (value, digits) => (Number(value.toFixed(digits)) || 0).toFixed(digits);
const number = (digits) => (value) => value === null ? NONE : fixed(value, digits);
const percent = (digits) => (value) => value === null ? NONE : fixed(100 * value, digits) + "\u00a0%";
const count = (value) => value === null ? NONE : value.toLocaleString("en");
const spoken = (site) => ({ finetuned: "fine-tuned" })[site] ?? site;

// A value of a field in the digits that its measure has in Python: ".2%", "+.2f", ",.0f".
const inDigits = (key, value) => {
  const [, digits, kind] = /\.(\d)(.)$/.exec(terms[key].form);
  if (kind === "g") return value === null ? NONE : String(Number(value.toPrecision(Number(digits))));
  return kind === "%" ? percent(Number(digits))(value) : number(Number(digits))(value);
};

const meaning = (key) => {
  const term = terms[key];
  return `${term.name}${term.unit ? ` (${term.unit})` : ""}: ${term.meaning}`;
};
const termLink = (key, shown) =>
  el("a", { class: "n plain", href: `#term-${key}`, "data-tip": meaning(key), text: shown ?? terms[key].label });

// One bubble for all: a title of the browser's own is not shown on focus, nor on a phone.
const tip = byId("tip");
const showTip = (event) => {
  const at = event.target.closest?.("[data-tip]");
  if (!at) return;
  tip.textContent = at.dataset.tip;
  tip.hidden = false;
  const box = at.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, innerWidth - own.width - 8));
  const above = box.bottom + own.height + 10 > innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${above ? Math.max(4, box.top - own.height - 6) : box.bottom + 6}px`;
};
const hideTip = () => { tip.hidden = true; };
for (const name of ["mouseover", "focusin"]) document.addEventListener(name, showTip);
for (const name of ["mouseout", "focusout", "click"]) document.addEventListener(name, hideTip);
document.addEventListener("scroll", hideTip, true);
