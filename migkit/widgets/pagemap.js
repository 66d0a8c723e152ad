// The page map: a canvas of cells, a lens that shows the shapes of the cells under the pointer,
// a legend with counts, a line with the history of a page.

const WIDTH = 1024; // pixels across, shared out among a row's cells
const LENS = { columns: 33, rows: 9, size: 16 };

// Whether pixel (x, y) of a cell of s pixels lies on the ink of a shape.
const SHAPES = {
  none: () => false,
  slash: (x, y, s) => Math.abs(x + y - (s - 1)) < s / 5,
  cross: (x, y, s) => Math.abs(x + y - (s - 1)) < s / 6 || Math.abs(x - y) < s / 6,
  bar: (x, y, s) => Math.abs(y - (s - 1) / 2) < s / 7 + 0.1,
  dot: (x, y, s) => Math.hypot(x - (s - 1) / 2, y - (s - 1) / 2) < s / 4,
  ring: (x, y, s) => Math.abs(Math.hypot(x - (s - 1) / 2, y - (s - 1) / 2) - s / 3.2) < s / 9,
};

function rgba(hex) {
  const n = parseInt(hex.slice(1), 16);
  return (0xff000000 | ((n & 0xff) << 16) | (n & 0xff00) | (n >> 16)) >>> 0; // little-endian
}

function tile(look, size, outlined) {
  const pixels = new Uint32Array(size * size).fill(rgba(look.fill));
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      const edge = outlined && (x === size - 1 || y === size - 1);
      if (edge) pixels[y * size + x] = rgba("#8C8C8C");
      else if (size >= 8 && SHAPES[look.shape](x, y, size)) {
        pixels[y * size + x] = rgba(look.ink);
      }
    }
  }
  return pixels;
}

function element(parent, name, className) {
  const one = document.createElement(name);
  one.className = className;
  parent.append(one);
  return one;
}

function render({ model, el }) {
  const root = element(el, "div", "migkit-pagemap");
  const canvas = element(root, "canvas", "migkit-pagemap-cells");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  const lens = element(root, "canvas", "migkit-pagemap-lens");
  lens.width = LENS.columns * LENS.size;
  lens.height = LENS.rows * LENS.size;
  lens.setAttribute("aria-hidden", "true");
  const line = element(root, "div", "migkit-pagemap-line");
  line.setAttribute("aria-live", "polite");
  const legend = element(root, "div", "migkit-pagemap-legend");
  const key = model.get("key");
  const lensTiles = key.map((look) => tile(look, LENS.size, true));
  const counters = key.map((look) => {
    const item = element(legend, "span", "migkit-pagemap-item");
    const swatch = element(item, "canvas", "");
    swatch.width = swatch.height = LENS.size;
    const image = new ImageData(LENS.size, LENS.size);
    new Uint32Array(image.data.buffer).set(tile(look, LENS.size, true));
    swatch.getContext("2d").putImageData(image, 0, 0);
    element(item, "span", "").textContent = look.label;
    return element(item, "b", "");
  });

  let columns, rows, size, tiles, states, image, pixels;
  let pointed = -1;
  let described = 0;
  let queued = false;

  function layout() {
    const n = Math.max(1, model.get("n_cells"));
    root.style.display = model.get("n_cells") ? "" : "none";
    columns = 1;
    while (columns * columns < 4 * n) columns *= 2; // about four times as wide as high
    rows = Math.ceil(n / columns);
    size = Math.max(1, Math.floor(WIDTH / columns));
    canvas.width = columns * size;
    canvas.height = rows * size;
    tiles = key.map((look) => tile(look, size, size >= 8));
    states = new Uint8Array(n).fill(255);
    image = new ImageData(canvas.width, canvas.height);
    pixels = new Uint32Array(image.data.buffer);
    pointed = -1;
  }

  function draw() {
    queued = false;
    const view = model.get("cells");
    const packed = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
    const n = states.length;
    const counts = new Array(key.length).fill(0);
    const across = canvas.width;
    for (let i = 0; i < n; i++) {
      const state = (packed[i >> 1] >> ((i & 1) << 2)) & 15;
      counts[state]++;
      if (state === states[i]) continue;
      states[i] = state;
      const at = Math.floor(i / columns) * size * across + (i % columns) * size;
      const cell = tiles[state];
      if (size === 1) pixels[at] = cell[0];
      else for (let y = 0; y < size; y++) {
        pixels.set(cell.subarray(y * size, (y + 1) * size), at + y * across);
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    counts.forEach((count, i) => { counters[i].textContent = count.toLocaleString("en"); });
    root.dataset.frames = Number(root.dataset.frames || 0) + 1;
    root.dataset.counts = counts.join(",");
    if (performance.now() - described > 1000) {
      described = performance.now();
      const words = key.map((look, i) => counts[i] && `${counts[i]} ${look.label}`);
      canvas.setAttribute("aria-label", `Page map: ${words.filter(Boolean).join(", ")}`);
    }
    point(pointed);
  }

  function changed() { // at most one drawing a frame of the screen, of the latest states
    if (!queued) {
      queued = true;
      requestAnimationFrame(draw);
    }
  }

  function point(cell) {
    pointed = cell;
    lens.style.visibility = cell < 0 ? "hidden" : "visible";
    if (cell < 0) return;
    const context = lens.getContext("2d");
    context.clearRect(0, 0, lens.width, lens.height);
    const left = (cell % columns) - (LENS.columns >> 1);
    const top = Math.floor(cell / columns) - (LENS.rows >> 1);
    const one = new ImageData(LENS.size, LENS.size);
    const bits = new Uint32Array(one.data.buffer);
    for (let y = 0; y < LENS.rows; y++) {
      for (let x = 0; x < LENS.columns; x++) {
        const at = (top + y) * columns + left + x;
        if (left + x < 0 || left + x >= columns || at < 0 || at >= states.length) continue;
        if (states[at] >= key.length) continue;
        bits.set(lensTiles[states[at]]);
        context.putImageData(one, x * LENS.size, y * LENS.size);
      }
    }
    context.strokeStyle = "#D55E00";
    context.lineWidth = 3;
    const { size: s } = LENS;
    context.strokeRect((LENS.columns >> 1) * s, (LENS.rows >> 1) * s, s, s);
  }

  function ask(cell) {
    if (cell === pointed || cell < 0 || cell >= states.length) return;
    point(cell);
    const page = cell * model.get("pages_per_cell");
    line.textContent = `page ${page.toLocaleString("en")}: ${key[states[cell]]?.label ?? ""}`;
    model.send({ page });
  }

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const y = Math.floor(((event.clientY - box.top) / box.height) * rows);
    ask(y * columns + Math.min(x, columns - 1));
  });
  canvas.addEventListener("pointerleave", () => point(-1));
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    if (!(event.key in steps)) return;
    event.preventDefault();
    event.stopPropagation();
    ask(Math.max(0, pointed) + steps[event.key]);
  });
  model.on("msg:custom", (message) => {
    if (message.page === pointed * model.get("pages_per_cell")) line.textContent = message.text;
  });
  model.on("change:n_cells", () => { layout(); changed(); });
  model.on("change:cells", changed);
  model.on("change:mark", () => point(model.get("mark")));
  line.textContent = "Point at a page (or use the arrow keys) to see what became of it.";
  layout();
  draw();
}

export default { render };
