"use strict";
/* Mouse, keys and buttons; then the first picture. */

const STEP = 60;
const acts = {
  fold: () => { foldAll(); redraw(); fit(0.8); },
  unfold: () => { if (!openLevel()) say(`more than ${MOST} boxes: some groups stay folded`); redraw(); fit(0.5); },
  closer: () => zoom(1.25),
  farther: () => zoom(0.8),
  fit: () => fit(),
  theme: () => {
    const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = root.dataset.theme ?? (dark ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  },
};
for (const [id, act] of Object.entries(acts)) document.getElementById(id).addEventListener("click", () => { say(""); act(); });

const itemAt = (target) => {
  const found = target.closest?.(".item");
  return found ? ITEMS[Number(found.dataset.id)] : null;
};

canvas.addEventListener("click", (event) => {
  const item = itemAt(event.target);
  if (!item) return;
  say("");
  if (event.target.closest(".toggle")) turn(item);
  choose(item);
});
canvas.addEventListener("dblclick", (event) => {
  const item = itemAt(event.target);
  if (item && !event.target.closest(".toggle")) { turn(item); choose(item); }
});
canvas.addEventListener("keydown", (event) => {
  const item = itemAt(event.target);
  if (!item || (event.key !== "Enter" && event.key !== " ")) return;
  event.preventDefault();
  if (event.key === " ") turn(item);
  choose(item);
  view.querySelector(`.item[data-id="${item.id}"]`)?.focus({ preventScroll: true });
});

let dragged = null;
canvas.addEventListener("pointerdown", (event) => { if (event.button === 0) dragged = { x: event.clientX, y: event.clientY, moved: false }; });
addEventListener("pointermove", (event) => {
  if (!dragged) return;
  camera.x += event.clientX - dragged.x;
  camera.y += event.clientY - dragged.y;
  dragged = { x: event.clientX, y: event.clientY };
  move();
});
addEventListener("pointerup", () => { dragged = null; });
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  if (event.ctrlKey || event.metaKey) {
    const edge = canvas.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY / 300), event.clientX - edge.left, event.clientY - edge.top);
    return;
  }
  camera.x -= event.shiftKey ? event.deltaY : event.deltaX;
  camera.y -= event.shiftKey ? 0 : event.deltaY;
  move();
}, { passive: false });

const KEYS = {
  "/": () => { field.focus(); field.select(); },
  "+": acts.closer, "=": acts.closer, "-": acts.farther, 0: acts.fit, f: acts.fold, u: acts.unfold,
  p: () => player.toggle(), "[": () => player.turn(-1), "]": () => player.turn(1),
  ArrowLeft: () => { camera.x += STEP; move(); }, ArrowRight: () => { camera.x -= STEP; move(); },
  ArrowUp: () => { camera.y += STEP; move(); }, ArrowDown: () => { camera.y -= STEP; move(); },
  Escape: () => { chosen = null; mark(); showStart(); },
};
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, select, pre")) return;
  if (Object.hasOwn(KEYS, event.key)) { event.preventDefault(); KEYS[event.key](); }
});

document.getElementById("title").textContent = DATA.title;
document.getElementById("summary").textContent = DATA.detail;
drawHeads();
drawKey();
showStart();
const player = makePlayer();
openUpTo(36);
redraw();
fit(0.8);
