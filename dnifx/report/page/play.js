"use strict";
/* Plays a schedule: which action runs where and when. A row is a partition at one place. */

const ROW = 24, UNIT = 40, NAMES = 7.4;

function makePlayer() {
  const box = document.getElementById("player"), times = document.getElementById("times"), slider = document.getElementById("when");
  const now = document.getElementById("now"), run = document.getElementById("run"), scaled = document.getElementById("scaled"), list = document.getElementById("plays");
  const state = { play: null, time: 0, end: 1, running: false, moved: false, last: 0, left: 120, width: 1, shown: "" };
  if (!DATA.plays.length) return { toggle() {}, turn() {} };
  box.hidden = false;
  DATA.plays.forEach((play, number) => {
    const option = html("option", { value: number });
    option.textContent = play.title;
    list.append(option);
  });

  const span = (act) => (scaled.checked ? act.x : act.y);
  const xOf = (time) => state.left + (time / state.end) * state.width;

  function layOut() {
    const { play } = state, acts = play.acts;
    state.end = Math.max(...acts.map((act) => span(act)[1])) || 1;
    state.left = Math.min(260, Math.max(...play.rows.map((row) => row.length)) * NAMES + 20);
    const room = document.getElementById("rows").clientWidth - state.left - 16;
    state.width = scaled.checked ? room : Math.max(Math.min(room, state.end * UNIT * 1.6), state.end * UNIT);
    times.setAttribute("width", state.left + state.width + 12);
    times.setAttribute("height", play.rows.length * ROW + 8);
    const rows = play.rows.map((row, number) => {
      const text = svg("text", { x: 8, y: number * ROW + 20, class: "small" });
      text.textContent = short(row, 34);
      return svg("g", {}, svg("rect", { x: state.left, y: number * ROW + 4, width: state.width, height: ROW - 4, class: "track" }), text);
    });
    times.replaceChildren(...rows, ...acts.map(barOf), svg("line", { id: "hand", y1: 0, y2: play.rows.length * ROW + 8 }));
    seek(Math.min(state.time, state.end));
  }

  function barOf(act, number) {
    const [begin, end] = span(act), x = xOf(begin), w = Math.max(2, xOf(end) - x - 1);
    const made = svg("g", { class: `act kind-${act.a.replace(/[^A-Z_].*/, "")}`, "data-act": number, tabindex: -1 },
      svg("rect", { x, y: act.r * ROW + 5, width: w, height: ROW - 6, rx: 3 }));
    if (w > act.a.length * 7 + 4) {
      const text = svg("text", { x: x + w / 2, y: act.r * ROW + 20, "text-anchor": "middle" });
      text.textContent = act.a;
      made.append(text);
    }
    const title = svg("title");
    title.textContent = `${act.a}: ${act.s}, step ${act.n + 1}`;
    made.append(title);
    return made;
  }

  /* The actions that run at a time; one that takes no time runs where it stands. */
  const running = (time) => state.play.acts.filter((act) => {
    const [begin, end] = span(act);
    return begin <= time && (time < end || (end === state.end && time >= end) || (begin === end && time === begin));
  });

  function seek(time) {
    state.time = time;
    slider.value = String((time / state.end) * 1000);
    const hand = document.getElementById("hand"), x = xOf(time);
    hand?.setAttribute("x1", x);
    hand?.setAttribute("x2", x);
    const acts = running(time), names = acts.map((act) => `${act.a} ${act.s} (step ${act.n + 1})`).join("; ");
    if (names === state.shown) return;
    state.shown = names;
    now.textContent = names || "nothing runs";
    for (const each of document.querySelectorAll(".act.on, .working")) each.classList.remove("on", "working");
    acts.forEach((act) => {
      times.querySelector(`[data-act="${state.play.acts.indexOf(act)}"]`)?.classList.add("on");
      if (act.i === null || !state.moved) return;
      view.querySelector(`.item[data-id="${act.i}"]`)?.classList.add("working");
      view.querySelector(`[data-area="${act.i}"]`)?.classList.add("working");
    });
    const rows = document.getElementById("rows");
    if (x < rows.scrollLeft + state.left || x > rows.scrollLeft + rows.clientWidth - 40) rows.scrollLeft = x - state.left - 60;
  }

  function tick(stamp) {
    if (!state.running) return;
    const passed = state.last ? stamp - state.last : 0;
    state.last = stamp;
    const whole = scaled.checked ? 12000 : Math.max(2500, state.end * 550);
    state.moved = true;
    const next = state.time + (passed / whole) * state.end;
    seek(Math.min(next, state.end));
    if (next >= state.end) { pause(); return; }
    requestAnimationFrame(tick);
  }

  function pause() {
    state.running = false;
    run.textContent = "Play";
  }

  function toggle() {
    if (state.running) { pause(); return; }
    if (state.time >= state.end) seek(0);
    state.running = true;
    state.last = 0;
    run.textContent = "Pause";
    requestAnimationFrame(tick);
  }

  /* Go to the next or the last moment in which an action begins. */
  function turn(way) {
    pause();
    state.moved = true;
    const starts = [...new Set(state.play.acts.map((act) => span(act)[0]))].sort((a, b) => a - b);
    const next = way > 0 ? starts.find((time) => time > state.time + 1e-9) : starts.filter((time) => time < state.time - 1e-9).pop();
    seek(next ?? (way > 0 ? state.end : 0));
  }

  function start(number) {
    pause();
    state.play = DATA.plays[number];
    state.time = 0;
    state.shown = "-";
    layOut();
  }

  run.addEventListener("click", toggle);
  document.getElementById("earlier").addEventListener("click", () => turn(-1));
  document.getElementById("later").addEventListener("click", () => turn(1));
  slider.addEventListener("input", () => { pause(); state.moved = true; seek((Number(slider.value) / 1000) * state.end); });
  list.addEventListener("change", () => start(Number(list.value)));
  scaled.addEventListener("change", () => { pause(); state.time = 0; layOut(); });
  addEventListener("resize", layOut);
  times.addEventListener("click", (event) => {
    const bar = event.target.closest(".act");
    if (!bar) return;
    pause();
    state.moved = true;
    state.shown = "-";
    const act = state.play.acts[Number(bar.dataset.act)];
    seek(span(act)[0]);
    if (act.i !== null) {
      chosen = act.i;
      mark();
      showDetails({ ...ITEMS[act.i], c: act.c.length ? act.c : ITEMS[act.i].c });
    }
  });
  document.addEventListener("drawn", () => { state.shown = "-"; seek(state.time); });
  start(0);
  return { toggle, turn };
}
