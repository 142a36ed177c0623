"use strict";
/* The panel: what is known of an item, what it takes and gives, and its code. Every name is put in as text. */

const panel = document.getElementById("panel");

function choose(item) {
  chosen = item.id;
  mark();
  showDetails(item);
}

function showDetails(item) {
  const title = html("h2");
  title.textContent = item.l ? item.l[0] : item.t;
  const parts = [title];
  if (item.d && item.k !== "partition") {
    const detail = html("p", { class: "small" });
    detail.textContent = item.d;
    parts.push(detail);
  }
  const inside = around(item);
  if (inside.length) parts.push(listOf("Inside", inside.reverse()));
  parts.push(factsOf(item.f), ...linked("Takes from", takes(item)), ...linked("Gives to", gives(item)));
  for (const [listing, pieces] of item.c) parts.push(codeOf(listing, pieces));
  panel.replaceChildren(...parts);
  panel.scrollTop = 0;
  for (const code of panel.querySelectorAll("pre")) {
    const hit = code.querySelector("mark");
    if (hit) code.scrollTop = Math.max(0, hit.offsetTop - code.offsetTop - 48);
  }
}

function factsOf(facts) {
  const list = html("dl");
  for (const [label, text] of facts) {
    const name = html("dt"), value = html("dd");
    name.textContent = label;
    value.textContent = text;
    list.append(name, value);
  }
  return list;
}

function within(item, id) {
  for (let each = id; each !== null; each = ITEMS[each].p) if (each === item.id) return true;
  return false;
}

function leaves(item) {
  return item.children.length ? item.children.flatMap(leaves) : [item];
}

function takes(item) {
  return unique(leaves(item).flatMap((each) => each.into.map((flow) => flow.from)), item);
}

function gives(item) {
  return unique(leaves(item).flatMap((each) => each.out.map((flow) => flow.to)), item);
}

function unique(ids, item) {
  return [...new Set(ids)].filter((id) => !within(item, id)).map((id) => ITEMS[id]);
}

function linked(label, items) {
  return items.length ? [listOf(label, items)] : [];
}

function listOf(label, items) {
  const made = html("p", { class: "ways" }), name = html("span", { class: "label" });
  name.textContent = label;
  made.append(name);
  for (const item of items.slice(0, 12)) {
    const button = html("button", { class: "link", "data-go": item.id });
    button.textContent = short(item.l ? item.l[0] : item.n?.length === 1 && item.k === "operation" ? item.n[0] : item.t, 32);
    made.append(button);
  }
  if (items.length > 12) made.append(`and ${items.length - 12} more`);
  return made;
}

/* A listing, with the lines of the item marked. Without pieces nothing is marked. */
function codeOf(listing, pieces) {
  const { title, text } = DATA.code[listing], lines = text.split("\n"), code = html("pre", { tabindex: 0 });
  let next = 0;
  for (const [first, last] of pieces) {
    const hit = html("mark");
    hit.textContent = lines.slice(first - 1, last).join("\n");
    code.append(lines.slice(next, first - 1).map((line) => `${line}\n`).join(""), hit);
    next = last;
  }
  code.append(lines.slice(next).join("\n"));
  const head = html("h3");
  head.textContent = title;
  return html("section", { class: "code" }, head, code);
}

function showStart() {
  const title = html("h2"), how = html("p", { class: "small" });
  title.textContent = DATA.title;
  how.textContent = "Click a box for its shapes, its cost and its code. Double-click, or press Space, to fold and unfold a group. " +
    "Drag or use the arrow keys to move, Ctrl and the wheel to zoom, / to search, p to play the schedule.";
  const facts = [["model", DATA.detail], ["partitions", String(ITEMS.filter((item) => item.k === "partition").length)],
    ["cuts", String(ITEMS.filter((item) => item.k === "gate" && item.g !== "plain").length)], ...DATA.notes.map((note) => ["note", note])];
  panel.replaceChildren(title, how, factsOf(facts));
}

panel.addEventListener("click", (event) => {
  const button = event.target.closest("[data-go]");
  if (button) go(ITEMS[Number(button.dataset.go)]);
});

/* Open what is around an item, show it in the middle, and choose it. */
function go(item) {
  reveal(item);
  redraw();
  centre(item);
  choose(item);
}
