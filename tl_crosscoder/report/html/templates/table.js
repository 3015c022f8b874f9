// The table of latents: columns, sorting, filters, search. A narrow window has no space for minor columns.
const ranked = (key, isMinor) => ({
  name: terms[key].label, term: key, key: (l) => l.ranked[key], show: (value) => inDigits(key, value), isMinor,
});
// A column that says the same of every latent says nothing.
const isTold = (values) => values.length < 2 ? values.some((value) => value != null) : new Set(values.map((value) => value ?? null)).size > 1;
const COLUMNS = [
  { name: "#", key: (l) => l.ranked.place, show: count },
  { name: "latent", key: (l) => l.latent, show: String },
  ...(data.compared ? [{ ...ranked("latent_class", true), isText: true }] : []),
  ranked("attribution_share"), ranked("score", true), ranked("relative_decoder_norm"), ranked("delta_norm", true), ranked("decoder_cosine", true),
  ranked("nu_error", true), ranked("nu_reconstruction", true), ranked("explained_difference"),
  ranked("active_share", true), ranked("template_share", true),
  { ...ranked("main_role", true), key: (l) => l.main_role, isText: true },
  { name: "source", key: (l) => l.main_source, isText: true, isMinor: true },
].filter((column) => isTold(data.latents.map(column.key)));

const records = data.latents;
const placeOf = new Map(records.map((record, i) => [record.latent, i]));
const body = document.querySelector("#table tbody");
let sorted = { column: COLUMNS[0], descending: false };
let visible = records.map((_, i) => i);

// Whole characters: half an emoji would be shown as a replacement character.
const first = (text, n) => [...text].slice(0, n).join(""), last = (text, n) => [...text].slice(-n).join("");
const lineOf = (tokens) => tokens.join("").replaceAll("\u2060", "").replaceAll("↵\n", "↵");
const contextOf = (example) => {
  const cell = document.createDocumentFragment();
  if (!example) { cell.append(NONE); return cell; }
  const { tokens, at } = example;
  cell.append(
    el("bdi", { class: "tok-line", text: last(lineOf(tokens.slice(0, at)), 36) }),
    el("b", { class: "tok-line", text: lineOf([tokens[at]]) }),
    el("bdi", { class: "tok-line", text: first(lineOf(tokens.slice(at + 1)), 60) }),
  );
  return cell;
};

const classOf = (column) => [column.isText ? "" : "num", column.isMinor ? "minor" : ""].join(" ").trim() || null;
const rows = records.map((record, i) => {
  const cells = COLUMNS.map((column) => {
    const shown = column.isText ? column.key(record) : column.show(column.key(record));
    const node = column.name === "latent" ? el("a", { href: `#latent-${record.latent}`, text: shown }) : shown;
    return el("td", { class: classOf(column) }, node);
  });
  const context = el("td", { class: "context" }, contextOf(record.examples[0]));
  return el("tr", { "data-place": i }, ...cells, context);
});

const sortBy = (column) => {
  // Numbers begin with the largest, places and words with the first.
  const isAscending = column.isText || column.name === "#" || column.name === "latent";
  const descending = sorted.column === column ? !sorted.descending : !isAscending;
  sorted = { column, descending };
  update();
};

const heads = COLUMNS.map((column) => {
  const tipOf = column.term ? { "data-tip": meaning(column.term) } : {};
  const button = el("button", { type: "button", text: column.name, onclick: () => sortBy(column), ...tipOf });
  return el("th", { scope: "col", class: classOf(column) }, button);
});
document.querySelector("#table thead").append(el("tr", {}, ...heads, el("th", { scope: "col", text: "example" })));

// What is searched, each part with how much a word in it says of the latent.
let searched = null;
const lines = [];
const exampleLines = (i) => lines[i] ??= records[i].examples.map((example) => lineOf(example.tokens));
const searchParts = () => searched ??= records.map((record, i) => [
  [16, [String(record.latent)], true],
  [8, record.name ? [record.name] : []],
  [4, record.examples.map((example) => lineOf([example.tokens[example.at]]))],
  [2, record.logits.flatMap((l) => l.promoted.map(([token]) => lineOf([token])))],
  [1, [...exampleLines(i),
    ...record.logits.flatMap((l) => l.suppressed.map(([token]) => lineOf([token])))]],
].map(([weight, lines, isWhole]) => [weight, lines.map((line) => line.toLowerCase()), isWhole]));
// 0 where a word is nowhere.
const relevance = (i, words) => {
  let total = 0;
  for (const word of words) {
    let own = 0;
    for (const [weight, lines, isWhole] of searchParts()[i]) {
      const n = lines.filter((line) => isWhole ? line === word : line.includes(word)).length;
      if (n) own += weight * (1 + n / lines.length);
    }
    if (!own) return 0;
    total += own;
  }
  return total;
};
const searchWords = () => byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);

const filtered = (found) => {
  const chosenClass = byId("class").value, role = byId("role").value;
  const least = byId("least").value === "" ? -Infinity : byId("least").value / 100;
  const most = byId("most").value === "" ? Infinity : byId("most").value / 100;
  const isOnly = byId("favourites").checked;
  return records.map((_, i) => i).filter((i) => {
    const { ranked, main_role } = records[i];
    return (!chosenClass || ranked.latent_class === chosenClass)
      && (!role || main_role === role)
      && ranked.active_share >= least && ranked.active_share <= most
      && (!isOnly || favourites.has(records[i].latent))
      && (!found || found.get(i) > 0);
  });
};

const compare = (i, j) => {
  const [a, b] = [sorted.column.key(records[i]), sorted.column.key(records[j])];
  if (a === null || b === null) return (a === null) - (b === null) || i - j;
  const order = sorted.column.isText ? a.localeCompare(b) : a - b;
  return (sorted.descending ? -order : order) || i - j;
};

// What is searched for, where an example has it; else the strongest example.
const showMatch = (i, words) => {
  const own = words.length ? exampleLines(i) : [];
  const holds = (line, word) => line.toLowerCase().includes(word);
  const line = own.find((l) => words.every((word) => holds(l, word))) ?? own.find((l) => holds(l, words[0]));
  rows[i].lastChild.replaceChildren(line === undefined ? contextOf(records[i].examples[0]) : matchOf(line, words[0]));
};
const matchOf = (line, word) => {
  const at = line.toLowerCase().indexOf(word), end = at + word.length, found = document.createDocumentFragment();
  found.append(
    el("bdi", { class: "tok-line", text: last(line.slice(0, at), 30) }),
    el("mark", { class: "tok-line", text: line.slice(at, end) }),
    el("bdi", { class: "tok-line", text: first(line.slice(end), 80) }),
  );
  return found;
};

const update = () => {
  const words = searchWords();
  const found = words.length ? new Map(records.map((_, i) => [i, relevance(i, words)])) : null;
  const isByPlace = sorted.column === COLUMNS[0] && !sorted.descending;
  // What is searched for is sorted by relevance, unless another column was chosen.
  visible = filtered(found).sort(found && isByPlace ? (i, j) => found.get(j) - found.get(i) || compare(i, j) : compare);
  for (const i of visible) showMatch(i, words);
  body.replaceChildren(...visible.map((i) => rows[i]));
  byId("count").textContent = `${visible.length} of ${records.length} latents`;
  heads.forEach((head, i) => {
    const isSorted = COLUMNS[i] === sorted.column;
    head.setAttribute("aria-sort", !isSorted ? "none" : sorted.descending ? "descending" : "ascending");
    head.firstChild.textContent = COLUMNS[i].name + (!isSorted ? "" : sorted.descending ? " ↓" : " ↑");
  });
};

byId("filters").addEventListener("input", update);
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("filters").addEventListener("reset", () => setTimeout(update));
