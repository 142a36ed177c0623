"use strict";
/* Draws what is shown, and moves the view. */

const canvas = document.getElementById("canvas"), view = document.getElementById("view");
const LOOKS = {
  flow: "values", cut: "values across a cut", locked: "values across a locked cut", plain: "no gradient",
  synthetic: "synthetic gradient", target: "target gradient",
};
const camera = { x: 0, y: 0, k: 1 };
let drawing = null, chosen = null;

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(canvas.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function html(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/* A line that goes down straight, and from side to side in a curve. */
function pathOf(points) {
  let text = `M${points[0].x.toFixed(1)} ${points[0].y.toFixed(1)}`;
  for (let at = 1; at < points.length; at++) {
    const a = points[at - 1], b = points[at];
    if (Math.abs(a.x - b.x) < 0.5) { text += `L${b.x.toFixed(1)} ${b.y.toFixed(1)}`; continue; }
    const middle = ((a.y + b.y) / 2).toFixed(1);
    text += `C${a.x.toFixed(1)} ${middle} ${b.x.toFixed(1)} ${middle} ${b.x.toFixed(1)} ${b.y.toFixed(1)}`;
  }
  return text;
}

function redraw() {
  drawing = arrange();
  const groups = [], boxes = [];
  for (const [id, at] of drawing.places) (ITEMS[id].open ? groups : boxes).push([ITEMS[id], at]);
  groups.sort((a, b) => a[0].id - b[0].id);
  view.replaceChildren(
    svg("g", {}, ...groups.map(([item, at]) => areaOf(item, at))),
    svg("g", {}, ...drawing.pieces.flatMap(lineOf)),
    svg("g", {}, ...groups.map(([item, at]) => headingOf(item, at)), ...boxes.map(([item, at]) => boxOf(item, at))),
  );
  mark();
  document.dispatchEvent(new Event("drawn"));
}

function tintOf(item) {
  return item.k === "gate" ? "gate" : item.k === "end" ? "end" : `tint${item.b % 4}`;
}

function areaOf(item, at) {
  const look = item.k === "partition" ? `area ${tintOf(item)}` : `area inner ${tintOf(item)}`;
  return svg("rect", { x: at.x, y: at.y, width: at.w, height: at.h, rx: 8, class: look, "data-area": item.id });
}

function headingOf(item, at) {
  const title = svg("text", { x: at.x + 34, y: at.y + 19, class: "heading" });
  title.textContent = headOf(item);
  return svg("g", handle(item), toggle(at.x + 16, at.y + 14, "\u2212"), title, tip(item));
}

function handle(item) {
  const more = item.children.length ? { "aria-expanded": item.open } : {};
  return { class: "item", "data-id": item.id, tabindex: 0, role: "button", "aria-label": [item.t, item.d].filter(Boolean).join(", "), ...more };
}

function tip(item) {
  const made = svg("title");
  made.textContent = [item.t, item.d, ...item.f.slice(0, 6).map((fact) => fact.join(": "))].filter(Boolean).join("\n");
  return made;
}

function toggle(x, y, sign) {
  const text = svg("text", { x, y: y + 4.5, "text-anchor": "middle" });
  text.textContent = sign;
  return svg("g", { class: "toggle" }, svg("circle", { cx: x, cy: y, r: 8 }), text);
}

function boxOf(item, at) {
  const rect = { x: at.x, y: at.y, width: at.w, height: at.h, rx: item.k === "gate" ? 12 : 5 };
  const made = svg("g", handle(item));
  if (item.children.length) made.append(svg("rect", { ...rect, x: at.x + 4, y: at.y + 4, class: `box behind of-${tintOf(item)}` }));
  made.append(svg("rect", { ...rect, class: item.k === "gate" ? `gate ${item.g}` : `box of-${tintOf(item)}` }));
  const lines = linesOf(item), middle = at.x + at.w / 2 + (item.children.length ? 12 : 0);
  lines.forEach((line, number) => {
    const text = svg("text", { x: middle, y: at.y + at.h / 2 + (number - (lines.length - 1) / 2) * LINE + 4, class: number ? "small" : "strong", "text-anchor": "middle" });
    text.textContent = line;
    made.append(text);
  });
  if (item.children.length) made.append(toggle(at.x + 16, at.y + at.h / 2, "+"));
  made.append(tip(item));
  return made;
}

/* The line of a piece and, beside it, the gradient that goes back. */
function lineOf(piece) {
  const whole = { "data-from": piece.from, "data-to": [...piece.to].join(" ") };
  const head = piece.arrow ? { "marker-end": `url(#head-${piece.look})` } : {};
  const found = [svg("path", { d: pathOf(piece.points), class: `line ${piece.look}`, ...head, ...whole })];
  if (piece.back) {
    const aside = piece.points.map(({ x, y }) => ({ x: x + 7, y })).reverse();
    found.push(svg("path", { d: pathOf(aside), class: `line ${piece.back}`, "marker-end": `url(#head-${piece.back})`, ...whole }));
  }
  return found;
}

function drawHeads() {
  const heads = document.getElementById("heads");
  for (const look of Object.keys(LOOKS)) {
    const size = { viewBox: "0 0 8 8", refX: 7.5, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto", markerUnits: "userSpaceOnUse" };
    heads.append(svg("marker", { id: `head-${look}`, ...size }, svg("path", { d: "M0 0.5L8 4L0 7.5z", class: `head ${look}` })));
  }
}

function drawKey() {
  const seen = new Set(DATA.flows.flatMap(([, , look, back]) => [look, back]));
  for (const [look, says] of Object.entries(LOOKS)) {
    if (!seen.has(look)) continue;
    const line = svg("svg", { width: 30, height: 10, "aria-hidden": "true" }, svg("path", { d: "M1 5L29 5", class: `line ${look}`, "marker-end": `url(#head-${look})` }));
    document.getElementById("key").append(html("span", {}, line, says));
  }
}

/* Show which item is chosen, with the lines to and from it. */
function mark() {
  for (const each of view.querySelectorAll(".chosen, .near")) each.classList.remove("chosen", "near");
  if (chosen === null) return;
  const at = standing()[chosen];
  view.querySelector(`.item[data-id="${at}"]`)?.classList.add("chosen");
  view.querySelector(`[data-area="${at}"]`)?.classList.add("chosen");
  for (const line of view.querySelectorAll(".line")) {
    const near = line.dataset.from === String(at) || line.dataset.to.split(" ").includes(String(at));
    line.classList.toggle("near", near);
  }
}

function move() {
  view.setAttribute("transform", `translate(${camera.x.toFixed(2)} ${camera.y.toFixed(2)}) scale(${camera.k.toFixed(4)})`);
}

function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const k = Math.min(3, Math.max(0.04, camera.k * factor));
  camera.x = x - (x - camera.x) * (k / camera.k);
  camera.y = y - (y - camera.y) * (k / camera.k);
  camera.k = k;
  move();
}

/* Show everything; never smaller than the given scale, and then from the top. */
function fit(least = 0.04) {
  const w = canvas.clientWidth, h = canvas.clientHeight;
  camera.k = Math.max(least, Math.min(1, (w - 24) / drawing.w, (h - 24) / drawing.h));
  camera.x = (w - drawing.w * camera.k) / 2;
  camera.y = Math.max(12, (h - drawing.h * camera.k) / 2);
  move();
}

function centre(item) {
  const at = drawing.places.get(standing()[item.id]);
  if (!at) return;
  camera.k = Math.max(camera.k, 0.8);
  camera.x = canvas.clientWidth / 2 - (at.x + at.w / 2) * camera.k;
  camera.y = canvas.clientHeight / 2 - (at.y + Math.min(at.h, canvas.clientHeight) / 2) * camera.k;
  move();
}

/* Open or close a group; its upper left corner stays where it was. */
function turn(item) {
  if (!item.children.length) return;
  const before = drawing.places.get(item.id);
  if (!item.open && shownItems().length + item.children.length > MOST) {
    say(`${shownItems().length} boxes are shown; fold some before you unfold more`);
    return;
  }
  item.open = !item.open;
  redraw();
  const after = drawing.places.get(item.id);
  camera.x += (before.x - after.x) * camera.k;
  camera.y += (before.y - after.y) * camera.k;
  move();
}

function say(text) {
  document.getElementById("said").textContent = text;
}
