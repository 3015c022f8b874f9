// Which latent is open, the address, and the keys.
const pane = byId("pane");
let opened = null; // place in `records`
let current = null;

const select = (i) => {
  current = i;
  rows.forEach((row, j) => {
    row.classList.toggle("current", j === i);
    if (j === i) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
  });
};

const openPane = (i) => {
  opened = i;
  select(i);
  pane.replaceChildren(...latentPane(i));
  pane.hidden = false;
  pane.scrollTop = 0;
  document.body.classList.add("open");
  rows[i].scrollIntoView({ block: "nearest" });
  pane.querySelector("h2").focus({ preventScroll: true });
  document.title = `Latent ${records[i].latent} – ${title}`;
};

const hidePane = () => {
  if (opened === null) return;
  opened = null;
  pane.hidden = true;
  pane.replaceChildren();
  document.body.classList.remove("open");
  document.title = title;
  rows[current]?.querySelector("a")?.focus({ preventScroll: true });
};

// Favourites stand in the address, so that a link holds them.
const addressOf = (latent) => `#${[latent === null ? "" : `latent-${latent}`, favourites.size ? `fav=${[...favourites].join(",")}` : ""].filter(Boolean).join("&")}`;
const showFavourites = () => {
  byId("only").hidden = favourites.size === 0;
  if (!favourites.size) byId("favourites").checked = false;
  rows.forEach((row, i) => row.classList.toggle("favourite", favourites.has(records[i].latent)));
};
const toggleFavourite = (latent) => {
  if (!favourites.delete(latent)) favourites.add(latent);
  history.replaceState(null, "", addressOf(opened === null ? null : latent));
  showFavourites();
  update();
};

const closePane = () => {
  history.pushState(null, "", addressOf(null));
  hidePane();
};

const absent = (latent) => {
  pane.replaceChildren(
    el("div", { class: "bar" }, el("h2", { tabindex: "-1", text: `Latent ${latent}` }), el("span", { class: "grow" }),
      el("button", { type: "button", text: "Close", onclick: () => closePane() })),
    el("p", { text: `This report has the first ${records.length} latents of the ranking, and ${latent} is not among them. A larger --n-latents takes in more; tl-crosscoder analyze --latent ${latent} prints it.` }));
  pane.hidden = false;
  opened = -1;
  document.body.classList.add("open");
  pane.querySelector("h2").focus({ preventScroll: true });
};

const follow = () => {
  const given = /(?:^#|&)fav=([\d,]*)/.exec(location.hash);
  if (given) {
    favourites.clear();
    for (const latent of given[1].split(",")) if (latent) favourites.add(Number(latent));
    showFavourites();
  }
  const match = /^#latent-(\d+)(?:&|$)/.exec(location.hash);
  if (match && !given && favourites.size) history.replaceState(null, "", addressOf(match[1]));
  if (!match) { hidePane(); return; }
  const i = placeOf.get(Number(match[1]));
  if (i === undefined) absent(match[1]);
  else if (i !== opened) openPane(i);
};

const move = (by) => {
  const at = visible.indexOf(current);
  const next = visible[at < 0 ? (by > 0 ? 0 : visible.length - 1) : at + by];
  if (next === undefined) return;
  if (opened !== null) {
    // Leafing through latents is one step of the browser's history.
    history.replaceState(null, "", addressOf(records[next].latent));
    openPane(next);
  } else {
    select(next);
    rows[next].scrollIntoView({ block: "nearest" });
    rows[next].querySelector("a").focus({ preventScroll: true });
  }
};

const isTyping = (target) => target.matches("input, select, textarea, #texts *");
const inTable = () => document.activeElement?.closest?.("#table tbody") !== null && document.activeElement !== document.body;
const keys = {
  j: () => move(1), k: () => move(-1),
  ArrowRight: () => opened !== null && (move(1), true), ArrowLeft: () => opened !== null && (move(-1), true),
  ArrowDown: () => opened === null && inTable() && (move(1), true), ArrowUp: () => opened === null && inTable() && (move(-1), true),
  f: () => { if (current === null) return false; toggleFavourite(records[current].latent); if (opened !== null) openPane(current); },
  "/": () => { if (opened !== null) closePane(); byId("search").focus(); byId("search").select(); },
  "?": () => byId("help").showModal(),
  Enter: () => {
    if (opened !== null || current === null || document.activeElement.matches("a, button, summary")) return false;
    location.hash = `latent-${records[current].latent}`;
  },
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (event.key === "Escape") {
    if (opened !== null) closePane();
    else if (isTyping(event.target)) event.target.blur();
    return;
  }
  if (event.target.id === "search" && ["Enter", "ArrowDown"].includes(event.key)) {
    current = null;
    move(1);
    event.preventDefault();
    return;
  }
  if (isTyping(event.target)) return;
  if (keys[event.key] && keys[event.key]() !== false) event.preventDefault();
});

body.addEventListener("click", (event) => {
  const row = event.target.closest("tr");
  if (!row || event.target.closest("a") || String(getSelection())) return;
  location.hash = `latent-${records[row.dataset.place].latent}`;
});
byId("help-button").addEventListener("click", () => byId("help").showModal());

byId("filters").addEventListener("change", update);

const title = document.title;
update();
addEventListener("hashchange", follow);
addEventListener("popstate", follow);
follow();
