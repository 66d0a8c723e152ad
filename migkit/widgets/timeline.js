// The timeline: the source's phases above, each fault as a mark at its time and place in RAM.
// Dragging chooses a span of time, a click moves the cursor there, Escape lets the span go.

const WIDTH = 1024;
const BAND = 30; // height of the row of phases
const PLOT = 250;
const LEFT = 78;
const BOTTOM = 44;

const MARKS = {
  o: (c, x, y, r) => { c.arc(x, y, r, 0, 7); c.fill(); },
  "^": (c, x, y, r) => { c.moveTo(x, y - r); c.lineTo(x + r, y + r); c.lineTo(x - r, y + r); c.fill(); },
  s: (c, x, y, r) => c.fillRect(x - r, y - r, 2 * r, 2 * r),
  D: (c, x, y, r) => {
    c.moveTo(x, y - r); c.lineTo(x + r, y); c.lineTo(x, y + r); c.lineTo(x - r, y); c.fill();
  },
  X: (c, x, y, r) => {
    c.moveTo(x - r, y - r); c.lineTo(x + r, y + r); c.moveTo(x + r, y - r); c.lineTo(x - r, y + r);
    c.lineWidth = 2; c.stroke();
  },
  ".": (c, x, y) => c.fillRect(x - 1, y - 1, 2, 2),
};

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "migkit-timeline";
  const canvas = document.createElement("canvas");
  canvas.width = WIDTH;
  canvas.height = BAND + PLOT + BOTTOM;
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  const legend = document.createElement("div");
  legend.className = "migkit-timeline-legend";
  root.append(canvas, legend);
  el.append(root);
  const context = canvas.getContext("2d");
  const still = document.createElement("canvas"); // what does not move: drawn once
  still.width = canvas.width;
  still.height = canvas.height;
  let drag = null;

  const span = () => model.get("span_ms");
  const toX = (ms) => LEFT + ((ms - span()[0]) / (span()[1] - span()[0])) * (WIDTH - LEFT - 4);
  const toMs = (x) => span()[0] + ((x - LEFT) / (WIDTH - LEFT - 4)) * (span()[1] - span()[0]);
  const toY = (share) => BAND + PLOT * (1 - share);
  const inside = (ms) => Math.min(Math.max(ms, span()[0]), span()[1]);
  const ink = () => getComputedStyle(root).color;

  function drawStill() {
    const c = still.getContext("2d");
    c.clearRect(0, 0, still.width, still.height);
    c.font = "600 14px sans-serif";
    c.textBaseline = "middle";
    for (const phase of model.get("phases")) {
      const x = toX(phase.start_ms);
      const width = Math.max(2, toX(phase.end_ms) - x);
      c.fillStyle = phase.color;
      c.fillRect(x, 2, width, BAND - 6);
      c.strokeStyle = "#000";
      c.lineWidth = 1;
      c.strokeRect(x, 2, width, BAND - 6);
      if (c.measureText(phase.name).width < width - 8) {
        c.fillStyle = phase.dark ? "#fff" : "#000";
        c.fillText(phase.name, x + 4, BAND / 2);
      }
    }
    c.strokeStyle = c.fillStyle = ink();
    c.strokeRect(LEFT, BAND, WIDTH - LEFT - 4, PLOT);
    c.textAlign = "center";
    for (const { at, text } of model.get("ticks")) {
      c.fillRect(toX(at), BAND + PLOT, 1, 6);
      c.fillText(text, toX(at), BAND + PLOT + 15);
    }
    c.fillText("time since the run's first event (ms)", WIDTH / 2, BAND + PLOT + 34);
    c.textAlign = "right";
    for (const share of [0, 0.5, 1]) {
      const y = toY(share) + (share === 1 ? 8 : share === 0 ? -8 : 0);
      c.fillText(`${Math.round(share * model.get("size_mib"))} MiB`, LEFT - 6, y);
    }
    c.textAlign = "left";
    const view = model.get("points");
    const points = new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
    const key = model.get("key");
    const r = points.length > 6000 ? 2 : 4;
    for (let i = 0; i < points.length; i += 3) {
      const look = key[points[i + 2]];
      c.fillStyle = c.strokeStyle = look.color;
      c.beginPath();
      MARKS[look.marker](c, toX(points[i]), toY(points[i + 1]), r);
    }
    legend.replaceChildren(...key.filter((look) => look.count).map((look) => {
      const item = document.createElement("span");
      const swatch = document.createElement("canvas");
      swatch.width = swatch.height = 16;
      const s = swatch.getContext("2d");
      s.fillStyle = s.strokeStyle = look.color;
      s.beginPath();
      MARKS[look.marker](s, 8, 8, 6);
      item.append(swatch, ` ${look.label} (${look.count.toLocaleString("en")})`);
      return item;
    }));
    canvas.setAttribute("aria-label", model.get("says"));
    draw();
  }

  function draw() {
    const c = context;
    c.clearRect(0, 0, canvas.width, canvas.height);
    const brush = drag ?? model.get("brush_ms");
    if (brush.length === 2) {
      const [from, to] = [Math.min(...brush), Math.max(...brush)].map(toX);
      c.fillStyle = "rgba(0, 114, 178, 0.22)";
      c.fillRect(from, BAND, Math.max(1, to - from), PLOT);
      c.strokeStyle = "#0072B2";
      c.lineWidth = 2;
      c.strokeRect(from, BAND, Math.max(1, to - from), PLOT);
    }
    c.drawImage(still, 0, 0);
    const x = toX(model.get("cursor_ms"));
    c.strokeStyle = ink();
    c.lineWidth = 2;
    c.setLineDash([7, 4]);
    c.beginPath();
    c.moveTo(x, 0);
    c.lineTo(x, BAND + PLOT);
    c.stroke();
    c.setLineDash([]);
    const chosen = model.get("chosen");
    if (chosen.length === 2) {
      for (const [color, width] of [["#fff", 7], ["#D55E00", 4]]) {
        c.strokeStyle = color;
        c.lineWidth = width;
        c.beginPath();
        c.arc(toX(chosen[0]), toY(chosen[1]), 11, 0, 7);
        c.stroke();
      }
    }
  }

  const msOf = (event) => {
    const box = canvas.getBoundingClientRect();
    return inside(toMs(((event.clientX - box.left) / box.width) * WIDTH));
  };
  function choose(brush) {
    model.set("brush_ms", brush);
    model.save_changes();
    draw();
  }
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    drag = [msOf(event), msOf(event)];
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag) return;
    drag[1] = msOf(event);
    draw();
  });
  canvas.addEventListener("pointerup", () => {
    if (!drag) return;
    const [from, to] = [Math.min(...drag), Math.max(...drag)];
    drag = null;
    if (toX(to) - toX(from) > 4) choose([from, to]);
    else {
      model.set("cursor_ms", from);
      model.save_changes();
      draw();
    }
  });
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Escape") choose([]);
  });
  for (const name of ["cursor_ms", "brush_ms", "chosen"]) model.on(`change:${name}`, draw);
  const themes = new MutationObserver(drawStill); // light or dark: the ink is the page's
  themes.observe(document.body, { attributes: true });
  requestAnimationFrame(drawStill); // once it is in the page, whose ink it takes
  return () => themes.disconnect();
}

export default { render };
