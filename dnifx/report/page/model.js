"use strict";
/* The data of the page, as a tree of items. An item is shown where all groups around it are open. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const ITEMS = DATA.items;
const TOP = [];
const MOST = 700;

ITEMS.forEach((item, id) => {
  Object.assign(item, { id, children: [], into: [], out: [], open: false, size: 0 });
  (item.p === null ? TOP : ITEMS[item.p].children).push(item);
});
for (let id = ITEMS.length - 1; id >= 0; id--) {
  const item = ITEMS[id];
  item.size += item.children.length ? 0 : 1;
  if (item.p !== null) ITEMS[item.p].size += item.size;
}
for (const [from, to, look, back] of DATA.flows) {
  const flow = { from, to, look, back };
  ITEMS[from].out.push(flow);
  ITEMS[to].into.push(flow);
}

/* Items that hold this one, the innermost first. */
function around(item) {
  const found = [];
  for (let each = item.p; each !== null; each = ITEMS[each].p) found.push(ITEMS[each]);
  return found;
}

/* For each item the one that stands for it: itself, or the outermost closed group around it. */
function standing() {
  const found = new Array(ITEMS.length);
  for (const item of ITEMS) {
    const hidden = item.p !== null && !(found[item.p] === item.p && ITEMS[item.p].open);
    found[item.id] = hidden ? found[item.p] : item.id;
  }
  return found;
}

function shownItems() {
  const found = [];
  const walk = (items) => items.forEach((item) => {
    found.push(item);
    if (item.open) walk(item.children);
  });
  walk(TOP);
  return found;
}

/* Open the closed groups that are shown, the largest levels first, as long as at most so many items are shown. */
function openUpTo(most) {
  let shown = shownItems();
  let count = shown.length;
  let full = true;
  while (true) {
    const closed = shown.filter((item) => item.children.length && !item.open).sort((a, b) => a.children.length - b.children.length);
    let opened = false;
    for (const item of closed) {
      if (count + item.children.length > most) { full = false; continue; }
      item.open = opened = true;
      count += item.children.length;
    }
    if (!opened) return full;
    shown = shownItems();
  }
}

/* Open one level more, and say whether all of it fitted. */
function openLevel() {
  let count = shownItems().length;
  let full = true;
  for (const item of shownItems()) {
    if (!item.children.length || item.open) continue;
    if (count + item.children.length > MOST) { full = false; continue; }
    item.open = true;
    count += item.children.length;
  }
  return full;
}

function foldAll() {
  for (const item of ITEMS) item.open = false;
}

/* Open what is around an item; where too much would be shown, only that. */
function reveal(item) {
  const groups = around(item);
  groups.forEach((group) => { group.open = true; });
  if (shownItems().length > MOST) {
    foldAll();
    groups.forEach((group) => { group.open = true; });
  }
}
