"use strict";
/* Places what is shown. Every open group is laid out by itself (dagre), then is one box in the group around it. What comes
   from outside enters a group at its upper edge and leaves it at its lower edge, at ports that both layouts share. */

const LETTER = 7.4, LINE = 16, HEAD = 28, PAD = 16, LONGEST = 38;

function short(text, most = LONGEST) {
  const letters = Array.from(text);
  if (letters.length <= most) return text;
  const tail = Math.floor((most - 1) / 2);
  return letters.slice(0, most - 1 - tail).join("") + "\u2026" + letters.slice(letters.length - tail).join("");
}

/* Width of a line of text; letters of scripts that are wide count twice. */
function wide(text) {
  let letters = 0;
  for (const letter of text) letters += letter.codePointAt(0) >= 0x1100 ? 2 : 1;
  return letters * LETTER;
}

function linesOf(item) {
  if (item.l) return item.l.map((line) => short(line, 46));
  const count = item.children.length && item.k !== "partition" ? [`${item.d ? "\u00b7 " : ""}${item.size} operations`] : [];
  if (item.k === "partition") return [short(item.t), ...item.d.split(" \u00b7 ").map((line) => short(line))];
  return [short(item.t), short([item.d, ...(item.k === "several" ? [] : count)].filter(Boolean).join(" "))].filter(Boolean);
}

function sizeOf(item) {
  const lines = linesOf(item);
  return { w: Math.max(64, ...lines.map(wide)) + 24 + (item.children.length ? 26 : 0), h: lines.length * LINE + 14 };
}

function headOf(item) {
  return short(item.k === "partition" ? [item.t, item.d].filter(Boolean).join(" \u00b7 ") : [item.t, item.k === "module" ? item.d : ""].filter(Boolean).join("  "), 64);
}

/* The pieces of every way between two items that are shown, by the group that they run in; -1 is the page. */
function ways() {
  const stands = standing();
  const groups = new Map([[-1, { pieces: new Map(), ins: new Set(), outs: new Set() }]]);
  for (const item of ITEMS) {
    if (item.open && stands[item.id] === item.id) groups.set(item.id, { pieces: new Map(), ins: new Set(), outs: new Set() });
  }
  const add = (group, v, w, from, to, flow) => {
    const pieces = groups.get(group).pieces, key = `${v} ${w} ${from}`;
    if (!pieces.has(key)) pieces.set(key, { v, w, from, to: new Set(), look: flow.look, back: flow.back });
    const piece = pieces.get(key);
    piece.to.add(to);
    if (flow.look !== "plain") piece.look = flow.look;
  };
  for (const [from, to, look, back] of DATA.flows) {
    const s = stands[from], u = stands[to];
    if (s === u) continue;
    const up = [s, ...around(ITEMS[s]).map((item) => item.id), -1];
    const down = [u, ...around(ITEMS[u]).map((item) => item.id), -1];
    const common = up.find((id) => id !== s && id !== u && down.includes(id)) ?? -1;
    const leaving = up.slice(0, up.indexOf(common)), entering = down.slice(0, down.indexOf(common));
    for (let at = 1; at < leaving.length; at++) {
      groups.get(leaving[at]).outs.add(s);
      add(leaving[at], `c${leaving[at - 1]}`, `o${s}`, s, u, { look, back: "" });
    }
    add(common, `c${leaving[leaving.length - 1]}`, `c${entering[entering.length - 1]}`, s, u, { look, back });
    for (let at = entering.length - 1; at >= 1; at--) {
      groups.get(entering[at]).ins.add(s);
      add(entering[at], `i${s}`, `c${entering[at - 1]}`, s, u, { look, back: "" });
    }
  }
  return groups;
}

const KEPT = new Map();

/* Lay out one group and all open groups in it: sizes, and places from its upper left corner. What is as it was is kept. */
function layGroup(id, groups) {
  const own = groups.get(id), children = id < 0 ? TOP : ITEMS[id].children, inner = new Map();
  for (const child of children) if (child.open) inner.set(child.id, layGroup(child.id, groups));
  const open = [...inner.values()].map((laid) => `${laid.id} ${laid.w} ${laid.h}`);
  const key = [...own.pieces.keys(), "", ...open].join("\n"), kept = KEPT.get(id);
  const laid = kept?.key === key ? { ...kept, own, inner } : { ...layAnew(id, own, children, inner), key };
  KEPT.set(id, laid);
  return laid;
}

function layAnew(id, own, children, inner) {
  const graph = new dagre.graphlib.Graph({ multigraph: true });
  graph.setGraph({ rankdir: "TB", nodesep: 22, edgesep: 14, ranksep: id < 0 ? 56 : 40 });
  for (const child of children) {
    const { w, h } = child.open ? inner.get(child.id) : sizeOf(child);
    graph.setNode(`c${child.id}`, { width: w, height: h });
  }
  const fed = new Set(), used = new Set();
  for (const piece of own.pieces.values()) { used.add(piece.v); fed.add(piece.w); }
  ports(graph, [...own.ins].map((each) => `i${each}`), "top", children.filter((each) => !fed.has(`c${each.id}`)));
  ports(graph, [...own.outs].map((each) => `o${each}`), "bottom", children.filter((each) => !used.has(`c${each.id}`)));
  for (const [key, piece] of own.pieces) graph.setEdge(piece.v, piece.w, { weight: piece.look === "plain" ? 1 : 2, minlen: 1 }, key);
  dagre.layout(graph);
  return measured(id, own, children, inner, graph);
}

/* Keep ports in the first or the last row, and everything else on the other side of them. */
function ports(graph, names, end, others) {
  if (!names.length) return;
  graph.setNode(end, { width: 1, height: 0 });
  for (const name of names) {
    graph.setNode(name, { width: 10, height: 0 });
    graph.setEdge(...(end === "top" ? [end, name] : [name, end]), { weight: 1000, minlen: 1 }, `${end} ${name}`);
  }
  for (const child of others) {
    const name = `c${child.id}`;
    graph.setEdge(...(end === "top" ? [end, name] : [name, end]), { weight: 0, minlen: 2 }, `${end} ${name}`);
  }
}

function measured(id, own, children, inner, graph) {
  const boxes = children.map((child) => ({ child, ...graph.node(`c${child.id}`) }));
  const portNodes = [...own.ins].map((each) => graph.node(`i${each}`)).concat([...own.outs].map((each) => graph.node(`o${each}`)));
  const left = Math.min(...boxes.map((b) => b.x - b.width / 2), ...portNodes.map((p) => p.x - 8)) - PAD;
  const right = Math.max(...boxes.map((b) => b.x + b.width / 2), ...portNodes.map((p) => p.x + 8));
  const bends = [];
  for (const [key, piece] of own.pieces) bends.push(...graph.edge({ v: piece.v, w: piece.w, name: key }).points.map((p) => p.x));
  const low = Math.min(left, ...bends.map((x) => x - PAD)), far = Math.max(right, ...bends);
  const top = Math.min(...boxes.map((b) => b.y - b.height / 2)) - (id < 0 ? PAD : HEAD + (own.ins.size ? 24 : 10));
  const bottom = Math.max(...boxes.map((b) => b.y + b.height / 2)) + (id < 0 ? PAD : own.outs.size ? 24 : PAD);
  const rows = new Map();
  for (const box of boxes) {
    const row = rows.get(Math.round(box.y)) ?? [box.y, box.y];
    rows.set(Math.round(box.y), [Math.min(row[0], box.y - box.height / 2), Math.max(row[1], box.y + box.height / 2)]);
  }
  const title = id < 0 ? 0 : wide(headOf(ITEMS[id])) + 60;
  const w = Math.max(far - low + PAD, title), shift = Math.max(0, (title - (far - low + PAD)) / 2);
  return { w, h: bottom - top, id, own, inner, graph, boxes, rows, dx: shift - low, dy: -top };
}

/* Place everything on the page: boxes by id, and pieces of lines with their points. */
function arrange() {
  const groups = ways(), places = new Map(), ends = new Map(), pieces = [];
  const whole = layGroup(-1, groups);
  const put = (laid, x, y) => {
    for (const box of laid.boxes) {
      const at = { x: x + laid.dx + box.x - box.width / 2, y: y + laid.dy + box.y - box.height / 2, w: box.width, h: box.height };
      places.set(box.child.id, at);
      if (laid.inner.has(box.child.id)) put(laid.inner.get(box.child.id), at.x, at.y);
    }
    for (const kind of ["i", "o"]) {
      for (const each of kind === "i" ? laid.own.ins : laid.own.outs) ends.set(`${laid.id} ${kind}${each}`, x + laid.dx + laid.graph.node(kind + each).x);
    }
  };
  put(whole, 0, 0);
  const draw = (laid, x, y) => {
    for (const [key, piece] of laid.own.pieces) pieces.push(led(laid, key, piece, x, y, places, ends));
    for (const each of laid.inner.values()) draw(each, places.get(each.id).x, places.get(each.id).y);
  };
  draw(whole, 0, 0);
  return { places, pieces, w: whole.w, h: whole.h };
}

/* Lead one piece from box or port to box or port: straight down past rows of boxes, bent only between rows. */
function led(laid, key, piece, x, y, places, ends) {
  const { graph, rows } = laid, dx = x + laid.dx, dy = y + laid.dy, group = laid.id < 0 ? null : places.get(laid.id);
  const inner = graph.edge({ v: piece.v, w: piece.w, name: key }).points.slice(1, -1);
  const middle = inner.filter((point) => rows.has(Math.round(point.y)));
  const isBox = (name) => name[0] === "c";
  const row = (name) => rows.get(Math.round(graph.node(name).y));
  /* Where a piece meets a box: at the port of an open group, else as near to where it goes as the box allows. */
  const meet = (name, side, toward) => {
    if (!isBox(name)) return ends.get(`${laid.id} ${name}`);
    const box = places.get(Number(name.slice(1))), span = Math.max(0, box.w / 2 - 14), centre = box.x + box.w / 2;
    return ends.get(`${name.slice(1)} ${side}${piece.from}`) ?? Math.min(Math.max(toward, centre - span), centre + span);
  };
  const first = middle.length ? dx + middle[0].x : null, last = middle.length ? dx + middle[middle.length - 1].x : null;
  const wished = first ?? meet(piece.w, "i", dx + graph.node(piece.w).x);
  const begin = meet(piece.v, "o", wished), end = meet(piece.w, "i", last ?? begin);
  const points = [{ x: begin, y: isBox(piece.v) ? bottomOf(places, piece.v) : group.y }];
  const push = (px, py) => {
    const before = points[points.length - 1];
    if (before.x !== px || Math.abs(before.y - py) > 0.5) points.push({ x: px, y: py });
  };
  push(begin, isBox(piece.v) ? dy + row(piece.v)[1] : group.y + HEAD);
  for (const point of middle) for (const edge of rows.get(Math.round(point.y))) push(dx + point.x, dy + edge);
  if (isBox(piece.w)) push(end, dy + row(piece.w)[0]);
  push(end, isBox(piece.w) ? places.get(Number(piece.w.slice(1))).y : group.y + group.h);
  return { ...piece, points, arrow: isBox(piece.w) && !ITEMS[Number(piece.w.slice(1))].open };
}

function bottomOf(places, name) {
  const box = places.get(Number(name.slice(1)));
  return box.y + box.h;
}
