"use strict";
/* Search over titles, paths, classes and operations. Every word has to be found. */

const field = document.getElementById("search"), results = document.getElementById("results");
const TEXTS = ITEMS.map((item) => {
  const whole = item.f.filter(([label]) => label === "module" || label === "operation" || label === "estimator").map(([, text]) => text);
  return [item.t, item.d, ...(item.l ?? []), ...(item.n ?? []), ...whole].join("\n").toLowerCase();
});
const SHOWN = 40;
let found = [], at = -1;

/* Where a text has a word: better if a title is the word, or begins with it. */
function rank(item, words) {
  const title = item.t.toLowerCase();
  return (title === words[0] ? 0 : title.startsWith(words[0]) ? 1 : 2) * 4 + { partition: 0, gate: 0, module: 1 }[item.k] || 2;
}

function search(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const hits = ITEMS.filter((item) => words.every((word) => TEXTS[item.id].includes(word)));
  return hits.map((item) => [rank(item, words), item]).sort((a, b) => a[0] - b[0] || a[1].id - b[1].id).map(([, item]) => item);
}

function listResults() {
  found = search(field.value);
  at = found.length ? 0 : -1;
  results.replaceChildren();
  found.slice(0, SHOWN).forEach((item, number) => {
    const name = html("b"), where = html("span");
    name.textContent = short(item.l ? item.l[0] : item.t, 44);
    const path = item.f.find(([label]) => label === "module");
    where.textContent = short([item.l ? "" : item.d, path ? path[1] : ""].filter(Boolean).join("  "), 56);
    results.append(html("li", { id: `result-${number}`, role: "option", "aria-selected": number === at, "data-go": item.id }, name, where));
  });
  const some = html("li", { class: "count", role: "presentation" });
  some.textContent = found.length > SHOWN ? `${found.length} found, the first ${SHOWN} are listed` : `${found.length} found`;
  results.append(some);
  show(field.value.trim() !== "");
}

function show(open) {
  results.hidden = !open;
  field.setAttribute("aria-expanded", String(open));
  if (open && at >= 0) field.setAttribute("aria-activedescendant", `result-${at}`);
  else field.removeAttribute("aria-activedescendant");
}

function select(number) {
  at = Math.min(Math.max(number, 0), Math.min(found.length, SHOWN) - 1);
  [...results.querySelectorAll("[role=option]")].forEach((each, place) => each.setAttribute("aria-selected", String(place === at)));
  results.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "nearest" });
  show(true);
}

field.addEventListener("input", listResults);
field.addEventListener("focus", () => { if (field.value.trim()) show(true); });
field.addEventListener("blur", () => setTimeout(() => show(false), 150));
field.addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    select(at + (event.key === "ArrowDown" ? 1 : -1));
  } else if (event.key === "Enter" && at >= 0) {
    show(false);
    go(found[at]);
  } else if (event.key === "Escape") {
    show(false);
    field.blur();
  }
});
results.addEventListener("mousedown", (event) => {
  const result = event.target.closest("[data-go]");
  if (!result) return;
  event.preventDefault();
  show(false);
  go(ITEMS[Number(result.dataset.go)]);
});
