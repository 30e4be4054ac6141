// The page: reads its data, draws the map at once, and makes the rest ready when the vectors have been unpacked.

import { Adapter, Annotator, type Arrays } from "./adapter";
import { type About, readAbout, readArray, unitRows } from "./data";
import { count, csvRow, download, element, find, percent, swatch } from "./dom";
import { readVectors } from "./files";
import { type Island, islands } from "./islands";
import { type LegendActions, numbersLegend, TreeLegend, valuesLegend } from "./legend";
import { type Hit, MapView } from "./map";
import { Bank, type Found } from "./neighbours";
import { cellPanel, columnValue, type Facts, parts, partsTable, tally } from "./panels";
import { read, type State, write } from "./permalink";
import { Tree } from "./tree";
import { asCsv, nodesOf, placed, STATUSES, statusOf, type Yours } from "./yours";

const NEAREST = 15;
const TABS = [["types", "Types"], ["cell", "Cell"], ["group", "Group"], ["yours", "Your cells"]] as const;
const RAMP = ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"]; // viridis
const CATEGORIES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a000", "#8c6bb1", "#7f5539", "#2a9d8f", "#e76f51", "#8ab17d"];
const DIM = [128, 128, 128, 26] as const;

type Rgb = [number, number, number];
const rgb = (colour: string): Rgb => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)) as Rgb;

interface Vectors {
  fractal: Bank;
  raw: Bank;
  annotator: Annotator;
}

async function start(): Promise<void> {
  const about = readAbout();
  const tree = new Tree(about);
  const [maps, node] = await Promise.all([readArray<Int16Array>("maps"), readArray("node")]);
  const columns = await Promise.all(
    about.columns.map(async (column, i) => ({ column, values: (await readArray(`column_${i}`)).values })),
  );
  const n = about.cells;
  const prefixes = about.widths.length;
  const layouts = Array.from({ length: prefixes }, (_, j) =>
    Float32Array.from(maps.values.subarray(2 * n * j, 2 * n * (j + 1)), (value) => value / 32_000),
  );
  const study = columns.findIndex(({ column }) => column.values && /study|donor|batch|sample|dataset|patient/i.test(column.name));
  const facts: Facts = {
    tree,
    levels: about.levels,
    node: node.values,
    columns,
    study: study >= 0 ? study : columns.findIndex(({ column }) => column.values),
  };
  const page = new Page(about, tree, facts, layouts);
  Object.assign(window, { explorer: page }); // for the browser's console, and the tests
  page.begin();
  performance.mark("map"); // the cells are drawn
  // Let the browser show the map before the vectors, which are a hundred times larger, are unpacked.
  await new Promise((resolve) => setTimeout(resolve, 30));
  page.ready(await readVectorArrays(about));
  performance.mark("ready");
}

async function readVectorArrays(about: About): Promise<Vectors> {
  if (document.readyState === "loading") await new Promise((go) => document.addEventListener("DOMContentLoaded", go, { once: true }));
  const bank = async (name: string) => {
    const whole = await readArray<Int16Array>(name);
    return new Bank(unitRows(whole), whole.shape[0], whole.shape[1]);
  };
  const [fractal, raw, reference] = [await bank("fractal"), await bank("raw"), await bank("bank")];
  const arrays: Arrays = {};
  const names = ["mean", "axes", "linear", "path_anchors", "anchors", "class_means", "log_prior", "paths"];
  for (const k of [0, 1, 2]) names.push(`mlp_${k}_weight`, `mlp_${k}_bias`);
  for (const name of names) arrays[name] = await readArray(name);
  const doubles = (name: string) => readArray<Float64Array>(name);
  const annotator = new Annotator(
    new Adapter(about.adapter, arrays),
    about.annotator,
    about.nodes.length,
    reference.rows,
    (await readArray("bank_path")).values,
    (await doubles("whiten")).values,
    (await doubles("whitened_means")).values,
    await doubles("signals"),
    (await doubles("signal_weights")).values,
    [(await doubles("ood_score")).values, (await doubles("ood_weights")).values],
  );
  return { fractal, raw, annotator };
}

class Page {
  readonly map: MapView;
  vectors: Vectors | null = null;
  yours: Yours | null = null;
  group: number[] | null = null;
  private yoursInGroup = 0;
  cell: Hit | null = null;
  private colour = "prefix";
  private hovered: number | null = null;
  private pinned: number | null = null;
  private tab = "types";
  private busy = 0; // number of the file that is being read
  private legend: TreeLegend;
  private readonly counts: Uint32Array;
  private readonly known = new Map<string, Island[]>();
  private readonly slider = find<HTMLInputElement>("#slider");
  private readonly body: HTMLElement;
  private readonly choice: HTMLSelectElement;

  constructor(
    readonly about: About,
    readonly tree: Tree,
    readonly facts: Facts,
    private readonly layouts: Float32Array[],
  ) {
    document.title = `${about.title} – Fractal explorer`;
    find("#title h1").textContent = about.title;
    find("#title p").textContent =
      `${count(about.cells)}${about.total > about.cells ? ` of ${count(about.total)}` : ""} cells, ` +
      `${about.known ? "their own labels" : `labels by ${about.reference}`}`;
    this.counts = tree.counts(facts.node);
    this.legend = new TreeLegend(tree, this.counts, this.actions);
    this.choice = element("select", { id: "colour" });
    this.choice.append(
      element("option", { value: "prefix" }, "the level of the prefix"),
      ...about.levels.map((level, k) => element("option", { value: `level:${k + 1}` }, level)),
      ...about.columns.map((column, i) => element("option", { value: `column:${i}` }, column.name)),
    );
    this.body = element("div", { id: "legend" });
    find("#types").append(element("label", { className: "field" }, "Colour by ", this.choice), this.body);
    const bar = find("#prefix");
    this.map = new MapView(find("#points"), find("#overlay"), () => bar.offsetHeight + 24, {
      click: (hit) => this.choose(hit),
      hover: (hit, x, y) => this.tip(hit, x, y),
      lasso: (corners) => this.select(corners),
      moved: () => this.remember(),
    });
    this.map.add(layouts, this.colours());
    this.map.nameOf = (code) => tree.name(code);
    this.map.names = (prefix) => this.islands(prefix);
    this.map.lit = (hit) => this.isLit(hit);
  }

  private get actions(): LegendActions {
    return {
      hover: (value) => {
        if (value === this.hovered) return;
        this.hovered = value;
        this.paint();
      },
      pin: (value) => this.pin(this.pinned === value ? null : value),
    };
  }

  begin(): void {
    this.makeTools();
    this.makeTabs();
    this.makeSlider();
    this.makeSearch();
    this.makeDrop();
    this.makeKeys();
    this.makeHelp();
    this.choice.addEventListener("change", () => this.colourBy(this.choice.value));
    this.showCell();
    this.showGroup();
    this.showYours();
    this.restore(read(location.hash));
    addEventListener("hashchange", () => {
      if (location.hash !== this.address()) this.restore(read(location.hash));
    });
    this.map.drawNow();
  }

  ready(vectors: Vectors): void {
    this.vectors = vectors;
    this.showCell();
    this.showYours();
    document.documentElement.dataset.ready = "true";
  }

  // --- colours -----------------------------------------------------------------------------------------------------

  private get stop(): number {
    return Math.round(this.map?.prefix ?? 1);
  }

  /** The level (1, 2, ...) that colours the cells; null where a column does. */
  private get level(): number | null {
    if (this.colour.startsWith("column:")) return null;
    if (this.colour.startsWith("level:")) return Number(this.colour.slice(6));
    return this.about.levels.indexOf(this.about.blocks[this.stop - 1]) + 1;
  }

  private get column(): Facts["columns"][number] | null {
    return this.colour.startsWith("column:") ? this.facts.columns[Number(this.colour.slice(7))] : null;
  }

  private columnColours({ column }: Facts["columns"][number]): string[] {
    return [this.about.unknown, ...(column.values ?? []).map((_, i) => CATEGORIES[i % CATEGORIES.length])];
  }

  private isLit(hit: Hit): boolean {
    const { tree, facts } = this;
    const wanted = this.hovered ?? this.pinned;
    const node = hit.layer ? this.yours!.node[hit.row] : facts.node[hit.row];
    if (wanted === null) return true;
    if (this.column) return hit.layer > 0 || this.column.values[hit.row] === wanted;
    return wanted === 0 ? node === 0 : tree.isBelow(node, wanted);
  }

  private colours(layer = 0): Uint8Array {
    const { tree, facts, level, column } = this;
    const nodes = layer ? this.yours!.node : facts.node;
    const colours = new Uint8Array(4 * nodes.length);
    const palette = tree.nodes.map(({ colour }) => rgb(colour));
    const inGroup = this.group && this.tab === "group" && !layer ? new Set(this.group) : null;
    const values = column && !layer ? column.values : null;
    const ofColumn = column ? this.columnColours(column).map(rgb) : [];
    for (let row = 0; row < nodes.length; row++) {
      if (!this.isLit({ layer, row }) || (inGroup && !inGroup.has(row))) {
        colours.set(DIM, 4 * row);
        continue;
      }
      let shown = palette[tree.at(nodes[row], level ?? this.about.levels.length)];
      if (values && column) shown = column.column.values ? ofColumn[values[row]] : ramp(values[row], column.column.low!, column.column.high!, this.about.unknown);
      colours.set([...shown, 225], 4 * row);
    }
    return colours;
  }

  private paint(): void {
    this.map.setColours(0, this.colours());
    if (this.yours) this.map.setColours(1, this.colours(1));
  }

  colourBy(colour: string): void {
    const known = [...this.choice.options].some((option) => option.value === colour);
    this.colour = this.choice.value = known ? colour : "prefix";
    this.hovered = this.pinned = null;
    this.showLegend();
    this.paint();
    this.remember();
  }

  private showLegend(): void {
    const { column } = this;
    if (!column) this.body.replaceChildren(this.legend.root);
    else if (column.column.values) this.body.replaceChildren(valuesLegend(column.column.values, this.columnColours(column), column.values, this.actions));
    else this.body.replaceChildren(numbersLegend(column.column.low!, column.column.high!, RAMP));
    this.legend.mark(this.pinned);
  }

  pin(value: number | null): void {
    this.pinned = value;
    this.hovered = null;
    this.legend.mark(value);
    this.paint();
    this.remember();
  }

  private islands(prefix: number): Island[] {
    const level = this.level ?? this.about.levels.indexOf(this.about.blocks[prefix - 1]) + 1;
    const key = `${prefix} ${level}`;
    let found = this.known.get(key);
    if (!found) {
      const groups = Array.from(this.facts.node, (node) => (this.tree.depth[node] < level ? 0 : this.tree.at(node, level)));
      found = islands(this.layouts[prefix - 1], groups, Math.max(5, this.about.cells / 1000));
      this.known.set(key, found);
    }
    return found;
  }

  // --- the prefix --------------------------------------------------------------------------------------------------

  private makeSlider(): void {
    const { slider, about } = this;
    slider.max = String(about.widths.length);
    const buttons = about.blocks.map((block, i) => {
      const last = i === about.blocks.length - 1;
      const button = element("button", { title: `${about.widths[i]} numbers` }, last ? `full · ${block}` : `${i + 1} · ${block}`);
      button.addEventListener("click", () => this.setPrefix(i + 1));
      return button;
    });
    find("#stops").append(...buttons);
    slider.addEventListener("input", () => this.setPrefix(Number(slider.value), false));
    slider.addEventListener("change", () => this.setPrefix(Math.round(Number(slider.value))));
  }

  setPrefix(prefix: number, smooth = true): void {
    const target = Math.min(this.about.widths.length, Math.max(1, prefix));
    let before = this.stop;
    const step = (at: number) => {
      this.slider.value = String(at);
      const stop = Math.round(at);
      this.slider.setAttribute("aria-valuetext", `prefix ${stop}, ${this.about.blocks[stop - 1]}`);
      find("#stops").querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-pressed", String(i === stop - 1)));
      if (stop === before) return;
      before = stop;
      if (this.colour === "prefix") this.paint();
      this.showCell();
    };
    this.map.morph(target, smooth, step);
  }

  // --- a cell and its neighbours -----------------------------------------------------------------------------------

  neighbours(hit: Hit, prefix: number, k = NEAREST): { fractal: Found; raw: Found } | null {
    if (!this.vectors) return null;
    const { fractal, raw, annotator } = this.vectors;
    const width = this.about.widths[prefix - 1];
    const own = hit.layer ? -1 : hit.row;
    const vector = hit.layer
      ? this.yours!.answers.full.subarray(hit.row * annotator.adapter.width, (hit.row + 1) * annotator.adapter.width)
      : fractal.row(hit.row);
    const came = hit.layer ? this.yours!.vectors.subarray(hit.row * raw.dim, (hit.row + 1) * raw.dim) : raw.row(hit.row);
    return { fractal: fractal.nearest(vector, width, k, own), raw: raw.nearest(came, raw.dim, k, own) };
  }

  choose(hit: Hit | null): void {
    if (hit?.layer && this.yours && this.yours.answers.path[hit.row] < 0) return;
    this.cell = hit;
    this.map.chosen = hit;
    this.showCell();
    if (hit) this.showTab("cell");
    this.remember();
    this.map.draw();
  }

  private describe(hit: Hit): { title: string; node: number; lines: [string, string][] } {
    const { about, facts, tree, yours } = this;
    if (hit.layer && yours) {
      const node = yours.node[hit.row];
      const { answers } = yours;
      const depth = Math.max(1, answers.depth[hit.row]);
      const status = statusOf(answers, hit.row);
      return {
        title: `your cell ${yours.names ? yours.names[hit.row] : hit.row + 1}`,
        node,
        lines: [
          ["path", tree.names(node).join(" › ") || "none"],
          ["probability", percent(answers.probability[hit.row * about.levels.length + depth - 1])],
          ["status", status],
        ],
      };
    }
    const node = facts.node[hit.row];
    return {
      title: about.names ? about.names[hit.row] : `cell ${count(hit.row + 1)}`,
      node,
      lines: [
        ["path", tree.names(node).join(" › ") || "no label"],
        ...facts.columns.map((column): [string, string] => [column.column.name, columnValue(column, hit.row)]),
      ],
    };
  }

  private showCell(): void {
    const panel = find("#cell");
    const { cell, stop } = this;
    this.map.links = [];
    if (!cell) {
      panel.replaceChildren(element("p", { className: "empty" }, "Click a cell on the map: its nearest neighbours under the prefix are found here, in the page, beside those of the vector as it came."));
      return;
    }
    const found = this.neighbours(cell, stop);
    if (!found) {
      panel.replaceChildren(element("p", { className: "empty" }, "Unpacking the vectors …"));
      return;
    }
    const name = stop === this.about.widths.length ? "Full vector" : `Prefix ${stop}`;
    const pick = (row: number) => this.choose({ layer: 0, row });
    panel.replaceChildren(...cellPanel(this.facts, { ...this.describe(cell), found: [[name, found.fractal], ["Raw vector", found.raw]] }, pick));
    const ink = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
    const link = (row: number, dashed: boolean) => ({ from: cell, to: { layer: 0, row }, colour: dashed ? "#888888" : ink, dashed });
    this.map.links = [...found.raw.rows.map((row) => link(row, true)), ...found.fractal.rows.map((row) => link(row, false))];
    this.map.draw();
  }

  private tip(hit: Hit | null, x: number, y: number): void {
    const tip = find("#tip");
    tip.hidden = !hit;
    find("#points").classList.toggle("over", Boolean(hit));
    if (!hit) return;
    const { title, node, lines } = this.describe(hit);
    tip.replaceChildren(
      element("b", null, swatch(this.tree.nodes[node].colour), this.tree.name(node)),
      element("span", null, title),
      ...lines.slice(1, 5).map(([name, value]) => element("span", null, `${name}: ${value}`)),
    );
    const room = find("#map").clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(x + 14, room))}px`;
    tip.style.top = `${Math.max(8, y - tip.offsetHeight - 10)}px`;
  }

  // --- a group -----------------------------------------------------------------------------------------------------

  select(corners: number[] | null): void {
    this.map.setLasso(corners);
    this.group = corners ? this.map.inside(0, corners) : null;
    this.yoursInGroup = corners && this.yours ? this.map.inside(1, corners).length : 0;
    this.lassoMode(false);
    this.showGroup();
    if (corners) this.showTab("group");
    this.paint();
    this.remember();
  }

  private lassoMode(on: boolean): void {
    this.map.lassoing = on;
    find("#points").classList.toggle("lasso", on);
    find("#tool-lasso").setAttribute("aria-pressed", String(on));
  }

  private showGroup(): void {
    const panel = find("#group");
    const { group, tree, facts, about } = this;
    if (!group) {
      panel.replaceChildren(element("p", { className: "empty" }, "Hold Shift and draw around cells, or press Lasso: what they are, per level, against the whole map."));
      return;
    }
    const size = tree.nodes.length;
    const tables = about.levels.map((level, k) => {
      const up = (node: number) => tree.at(node, k + 1);
      const known = parts(tally(facts.node, size, group, up), tally(facts.node, size, undefined, up), (code) => tree.name(code), (code) => tree.nodes[code].colour);
      return partsTable(level, known);
    });
    const others = facts.columns.filter(({ column }) => column.values).map((column) => {
      const colours = this.columnColours(column);
      const name = (code: number) => (code ? column.column.values![code - 1] : "missing");
      return partsTable(column.column.name, parts(tally(column.values, colours.length, group), tally(column.values, colours.length), name, (code) => colours[code]));
    });
    const save = element("button", null, "Download as CSV");
    save.addEventListener("click", () => download("group.csv", new Blob([this.groupCsv(group)], { type: "text/csv" })));
    const clear = element("button", null, "Clear");
    clear.addEventListener("click", () => this.select(null));
    panel.replaceChildren(
      element("h2", null, `${count(group.length)} cells`),
      element("p", { className: "note" }, `${percent(group.length / about.cells)} of the map${this.yoursInGroup ? `, and ${count(this.yoursInGroup)} of your cells` : ""}. Bars: share of the group; the line: share of the whole map.`),
      element("p", { className: "buttons" }, save, clear),
      ...(group.length ? [...tables, ...others] : []),
    );
  }

  private groupCsv(group: number[]): string {
    const { about, tree, facts } = this;
    const head = csvRow(["cell_id", ...about.levels, ...about.columns.map((column) => column.name)]);
    const rows = group.map((row) => {
      const node = facts.node[row];
      const labels = about.levels.map((_, k) => (tree.depth[node] > k ? tree.name(tree.at(node, k + 1)) : ""));
      const values = facts.columns.map((column) => columnValue(column, row).replace(/^–$/, ""));
      return csvRow([about.names ? about.names[row] : String(row), ...labels, ...values]);
    });
    return head + rows.join("");
  }

  // --- cells that are dropped --------------------------------------------------------------------------------------

  private makeDrop(): void {
    const sign = find("#drop-here");
    const isFile = (event: DragEvent) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragover", (event) => {
      if (!isFile(event)) return;
      event.preventDefault();
      sign.hidden = false;
    });
    addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) sign.hidden = true;
    });
    addEventListener("drop", (event) => {
      event.preventDefault();
      sign.hidden = true;
      const file = event.dataTransfer?.files[0];
      if (file) void this.take(file);
    });
  }

  async take(file: File): Promise<void> {
    if (!this.vectors) return;
    const turn = ++this.busy;
    const { annotator, fractal } = this.vectors;
    this.showTab("yours");
    const panel = find("#yours");
    const meter = element("progress", { max: 1, value: 0 });
    const note = element("p", { className: "note" }, `Reading ${file.name} …`);
    const stop = element("button", null, "Stop");
    stop.addEventListener("click", () => {
      this.busy++;
      this.showYours();
    });
    panel.replaceChildren(note, meter, stop);
    let rested = performance.now();
    const rest = async (share: number) => {
      if (performance.now() - rested > 40) {
        meter.value = share;
        await new Promise((resolve) => setTimeout(resolve));
        rested = performance.now();
      }
      return turn === this.busy;
    };
    try {
      const { vectors, n, names } = await readVectors(file, annotator.adapter.dim);
      note.textContent = `Labelling ${count(n)} cells of ${file.name} …`;
      const answers = await annotator.answer(vectors, n, (done) => rest((0.6 * done) / n));
      const places = answers && (await placed(answers.full, n, fractal, this.about.widths, this.layouts, answers.path, (done) => rest(0.6 + (0.4 * done) / n)));
      if (!answers || !places) return;
      this.forget();
      this.yours = { file: file.name, names, vectors, answers, node: nodesOf(answers, this.about.annotator.paths), layouts: places };
      this.map.add(places, this.colours(1));
      this.showYours();
      this.showGroup();
    } catch (error) {
      if (turn !== this.busy) return;
      this.showYours();
      panel.prepend(element("p", { className: "error" }, `${file.name}: ${error instanceof Error ? error.message : "can't be read"}`));
    }
  }

  private forget(): void {
    if (this.cell?.layer) this.choose(null);
    if (this.yours) this.map.removeFrom(1);
    this.yours = null;
  }

  private showYours(): void {
    const panel = find("#yours");
    const { yours, about, tree } = this;
    const input = element("input", { type: "file", accept: ".csv,.tsv,.txt,.parquet,.pq,.npy" });
    input.addEventListener("change", () => {
      if (input.files?.[0]) void this.take(input.files[0]);
    });
    const open = element("label", { className: "file" }, this.vectors ? "Choose a file" : "Unpacking the vectors …", input);
    const dim = this.vectors?.annotator.adapter.dim;
    const help = element(
      "p",
      { className: "note" },
      `Drop a CSV, Parquet or .npy file anywhere on the page: a row per cell, ${dim ?? "its"} numbers of the same embedding (${about.facts.Vectors}). The adapter runs here, in the page; nothing leaves this machine.`,
    );
    if (!yours) {
      panel.replaceChildren(help, open);
      return;
    }
    const { answers } = yours;
    const by = new Map(STATUSES.map((status) => [status, 0]));
    for (let i = 0; i < answers.n; i++) {
      const status = statusOf(answers, i);
      by.set(status, by.get(status)! + 1);
    }
    const counts = new Map<number, number>();
    const mean = new Map<number, number>();
    for (let i = 0; i < answers.n; i++) {
      const node = yours.node[i];
      const depth = answers.depth[i];
      counts.set(node, (counts.get(node) ?? 0) + 1);
      if (depth) mean.set(node, (mean.get(node) ?? 0) + answers.probability[i * about.levels.length + depth - 1]);
    }
    const table = element("table", { className: "parts" }, element("caption", null, "Deepest label that can be trusted"));
    table.append(element("tr", null, ...["", "Cells", "Mean prob."].map((text) => element("th", null, text))));
    for (const [node, cells] of [...counts].sort((a, b) => b[1] - a[1]).slice(0, 25)) {
      const depth = tree.depth[node];
      const name = node ? `${tree.name(node)}` : "none";
      table.append(
        element(
          "tr",
          null,
          element("th", null, swatch(tree.nodes[node].colour), name, element("small", null, depth ? ` ${about.levels[depth - 1]}` : "")),
          element("td", null, count(cells)),
          element("td", null, node ? percent(mean.get(node)! / cells) : "–"),
        ),
      );
    }
    const usable = answers.n - by.get("invalid")!;
    const strange = usable ? by.get("novel")! / usable : 0;
    const warning = strange > 0.3 ? element("p", { className: "error" }, `${percent(strange)} of the cells are like nothing in the reference. Are they vectors of the same embedding?`) : null;
    const save = element("button", { id: "save-yours" }, "Download as CSV");
    save.addEventListener("click", () => download("labels.csv", new Blob([asCsv(yours, about, tree)], { type: "text/csv" })));
    const remove = element("button", null, "Remove");
    remove.addEventListener("click", () => {
      this.forget();
      this.showYours();
      this.showGroup();
    });
    const spread = about.annotator.cells > this.vectors!.annotator.cells;
    panel.replaceChildren(
      element("h2", null, `${count(answers.n)} cells of ${yours.file}`),
      ...(warning ? [warning] : []),
      element("p", { className: "note" }, STATUSES.filter((status) => by.get(status)).map((status) => `${count(by.get(status)!)} ${status}`).join(", ")),
      element("p", { className: "buttons" }, save, remove),
      table,
      element(
        "p",
        { className: "note" },
        `Each label is answered as deep as its probability is at least ${about.annotator.confidence}. ` +
          (spread
            ? `${count(this.vectors!.annotator.cells)} of the reference's ${count(about.annotator.cells)} cells vote in this page; fractal annotate asks them all.`
            : "The votes are those of fractal annotate."),
      ),
      open,
    );
  }

  // --- search, tools, keys -----------------------------------------------------------------------------------------

  private makeSearch(): void {
    const box = find("#search");
    const input = find<HTMLInputElement>("#search input");
    const list = find("#search ul");
    let chosen = 0;
    let found: { node: number; by: string }[] = [];
    const close = () => {
      list.hidden = true;
      box.setAttribute("aria-expanded", "false");
    };
    const pick = (node: number) => {
      input.value = "";
      close();
      input.blur();
      if (this.column) this.colourBy("prefix");
      this.legend.show(node);
      this.showTab("types");
      this.pin(node);
      this.map.frame([...Array(this.about.cells).keys()].filter((row) => this.tree.isBelow(this.facts.node[row], node)));
    };
    const show = () => {
      found = this.tree.search(input.value);
      chosen = Math.min(chosen, Math.max(0, found.length - 1));
      list.replaceChildren(
        ...found.map(({ node, by }, i) => {
          const { name, colour, id } = this.tree.nodes[node];
          const item = element(
            "li",
            null,
            swatch(colour),
            element("span", { className: "text" }, name, element("small", null, [by, id].filter((text, j) => text && (j === 0 || text !== by)).join(" · "))),
            element("span", { className: "count" }, count(this.counts[node])),
          );
          item.setAttribute("role", "option");
          item.setAttribute("aria-selected", String(i === chosen));
          item.addEventListener("pointerdown", (event) => {
            event.preventDefault();
            pick(node);
          });
          return item;
        }),
        ...(input.value.trim() && !found.length ? [element("li", { className: "empty" }, "no such type")] : []),
      );
      list.hidden = !input.value.trim();
      box.setAttribute("aria-expanded", String(!list.hidden));
    };
    input.addEventListener("input", () => {
      chosen = 0;
      show();
    });
    input.addEventListener("focus", show);
    input.addEventListener("blur", close);
    input.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        event.preventDefault();
        chosen = Math.max(0, chosen + (event.key === "ArrowDown" ? 1 : -1));
        show();
      } else if (event.key === "Enter" && found[chosen]) {
        pick(found[chosen].node);
      } else if (event.key === "Escape") {
        input.value = "";
        input.blur();
      }
      event.stopPropagation();
    });
  }

  private makeTools(): void {
    const tools: [string, string, string, () => void][] = [
      ["lasso", "Lasso", "draw around cells (L, or Shift and drag)", () => this.lassoMode(!this.map.lassoing)],
      ["reset", "Whole map", "0", () => this.map.reset()],
      ["png", "PNG", "save the map as a picture (S)", () => this.savePicture()],
      ["link", "Link", "copy the address of this view (K)", () => void this.copyLink()],
      ["theme", "◐", "light or dark (D)", () => this.toggleTheme()],
      ["help", "?", "help (?)", () => find<HTMLDialogElement>("#help").showModal()],
    ];
    find("#tools").append(
      ...tools.map(([id, text, title, act]) => {
        const button = element("button", { id: `tool-${id}`, title }, text);
        button.setAttribute("aria-label", title);
        button.addEventListener("click", act);
        return button;
      }),
    );
  }

  private makeTabs(): void {
    find("nav").append(
      ...TABS.map(([id, text]) => {
        const tab = element("button", { id: `tab-${id}` }, text);
        tab.setAttribute("role", "tab");
        tab.setAttribute("aria-controls", id);
        find(`#${id}`).setAttribute("aria-labelledby", tab.id);
        tab.addEventListener("click", () => this.showTab(id));
        return tab;
      }),
    );
    this.showTab("types");
  }

  private showTab(wanted: string): void {
    const before = this.tab;
    this.tab = wanted;
    for (const [id] of TABS) {
      find(`#${id}`).hidden = id !== wanted;
      find(`#tab-${id}`).setAttribute("aria-selected", String(id === wanted));
    }
    if (this.group && (before === "group") !== (wanted === "group")) this.paint();
    if (before !== wanted) this.remember();
  }

  private makeKeys(): void {
    const keys: Record<string, () => void> = {
      ArrowRight: () => this.setPrefix(this.stop + 1),
      ArrowLeft: () => this.setPrefix(this.stop - 1),
      "+": () => this.map.zoomBy(1.5),
      "=": () => this.map.zoomBy(1.5),
      "-": () => this.map.zoomBy(1 / 1.5),
      "0": () => this.map.reset(),
      l: () => this.lassoMode(!this.map.lassoing),
      s: () => this.savePicture(),
      k: () => void this.copyLink(),
      d: () => this.toggleTheme(),
      c: () => this.colourBy(this.choice.options[(this.choice.selectedIndex + 1) % this.choice.options.length].value),
      "/": () => find<HTMLInputElement>("#search input").focus(),
      "?": () => find<HTMLDialogElement>("#help").showModal(),
      Escape: () => this.clear(),
    };
    addEventListener("keydown", (event) => {
      const { target } = event;
      const writes = target instanceof HTMLSelectElement || (target instanceof HTMLInputElement && target.type !== "range");
      if (event.ctrlKey || event.metaKey || event.altKey || writes) return;
      if (find<HTMLDialogElement>("#help").open) return;
      const digit = Number(event.key);
      const act = digit >= 1 && digit <= this.about.widths.length ? () => this.setPrefix(digit) : keys[event.key];
      if (!act) return;
      event.preventDefault();
      act();
    });
  }

  private clear(): void {
    if (this.map.lassoing) this.lassoMode(false);
    else if (this.cell) this.choose(null);
    else if (this.group) this.select(null);
    else if (this.pinned !== null) this.pin(null);
  }

  private makeHelp(): void {
    const keys: [string, string][] = [
      ["1, 2, … and ← →", "the prefix"],
      ["/", "find a type"],
      ["C", "colour by the next level or column"],
      ["L, or Shift and drag", "lasso"],
      ["+ − 0", "closer, farther, whole map"],
      ["S, K", "save a picture, copy the link"],
      ["D", "light or dark"],
      ["Esc", "let go: lasso, cell, group, type"],
    ];
    const list = (lines: [string, string][]) =>
      element("dl", null, ...lines.flatMap(([name, text]) => [element("dt", null, name), element("dd", null, text)]));
    const close = element("button", null, "Close");
    const dialog = find<HTMLDialogElement>("#help");
    close.addEventListener("click", () => dialog.close());
    dialog.append(
      element("h2", null, "Fractal explorer"),
      element(
        "p",
        null,
        "Each cell is one vector. Cut after its first block it tells the system, after two the lineage, and so on. Move the slider, and islands split where the next block adds a level. The maps are drawings: distances between islands mean little. Neighbours are exact, computed here from the vectors.",
      ),
      list(keys),
      list(Object.entries(this.about.facts)),
      close,
    );
  }

  private toggleTheme(): void {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    this.showCell();
    this.map.draw();
  }

  /** The map with a legend of the level or column that colours it. */
  private savePicture(): void {
    const map = this.map.picture();
    const ratio = map.width / find("#points").clientWidth;
    const style = (name: string) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const rows = this.pictureLegend();
    const [line, side] = [18 * ratio, rows.length ? 230 * ratio : 0];
    const made = element("canvas", { width: map.width + side, height: Math.max(map.height, (rows.length + 2) * line) });
    const context = made.getContext("2d")!;
    context.fillStyle = style("--ground");
    context.fillRect(0, 0, made.width, made.height);
    context.drawImage(map, 0, 0);
    context.textBaseline = "middle";
    context.font = `${12 * ratio}px system-ui, sans-serif`;
    const prefix = this.stop === this.about.widths.length ? "full vector" : `prefix ${this.stop}`;
    context.fillStyle = style("--ink");
    context.fillText(`${this.about.title}, ${prefix}`, 12 * ratio, map.height - 14 * ratio);
    rows.forEach(([name, colour], i) => {
      const y = (i + 1) * line;
      context.fillStyle = colour;
      context.fillRect(map.width, y - 5 * ratio, 10 * ratio, 10 * ratio);
      context.fillStyle = style("--ink");
      context.fillText(name.length > 34 ? `${name.slice(0, 33)}…` : name, map.width + 16 * ratio, y);
    });
    made.toBlob((blob) => {
      if (blob) download(`${this.about.title.replace(/[^\w.-]+/g, "_")}_prefix_${this.stop}.png`, blob);
    });
  }

  private pictureLegend(): [string, string][] {
    const { column, level, tree } = this;
    if (column) return (column.column.values ?? []).slice(0, 40).map((name, i) => [name, this.columnColours(column)[i + 1]]);
    return tree.nodes.flatMap((node, i): [string, string][] => (tree.depth[i] === level && this.counts[i] ? [[node.name, node.colour]] : [])).slice(0, 60);
  }

  // --- the address -------------------------------------------------------------------------------------------------

  private address(): string {
    const state: State = {
      prefix: this.map.prefix,
      colour: this.colour,
      pinned: this.pinned,
      cell: this.cell && !this.cell.layer ? this.cell.row : null,
      camera: this.map.view[0] === 1 && Math.hypot(this.map.view[1], this.map.view[2]) < 1e-3 ? null : this.map.view,
      lasso: this.map.lasso && this.group ? [this.map.lassoAt, ...this.map.lasso] : null,
      tab: this.tab,
    };
    return write(state);
  }

  private remember(): void {
    if (this.restoring) return;
    history.replaceState(null, "", this.address());
  }

  private restoring = false;

  private restore(state: Partial<State>): void {
    this.restoring = true;
    const whole = (value: number | null | undefined, below: number) =>
      value !== null && value !== undefined && Number.isInteger(value) && value >= 0 && value < below ? value : null;
    this.colourBy(state.colour ?? "prefix");
    if (state.lasso) this.setPrefix(state.lasso[0], false); // the one at which it was drawn
    this.select(state.lasso ? state.lasso.slice(1) : null);
    this.setPrefix(state.prefix ?? 1, false);
    this.map.look(state.camera ?? [1, 0, 0]);
    const cell = whole(state.cell, this.about.cells);
    this.choose(cell === null ? null : { layer: 0, row: cell });
    const pinned = whole(state.pinned, this.column?.column.values ? this.column.column.values.length + 1 : this.tree.nodes.length);
    if (pinned !== null && !this.column) this.legend.show(pinned);
    this.pin(pinned);
    this.showTab(state.tab ?? "types");
    this.restoring = false;
    this.remember();
  }

  private async copyLink(): Promise<void> {
    this.remember();
    const button = find("#tool-link");
    try {
      await navigator.clipboard.writeText(location.href);
      button.textContent = "Copied";
    } catch {
      button.textContent = "See the address bar"; // a page from disk may not write to the clipboard
    }
    setTimeout(() => (button.textContent = "Link"), 1500);
  }
}

/** A number between low and high -> its colour in RAMP. */
function ramp(value: number, low: number, high: number, unknown: string): Rgb {
  if (!Number.isFinite(value)) return rgb(unknown);
  const at = Math.min(1, Math.max(0, (value - low) / (high - low || 1))) * (RAMP.length - 1);
  const [a, b] = [rgb(RAMP[Math.floor(at)]), rgb(RAMP[Math.min(RAMP.length - 1, Math.floor(at) + 1)])];
  return a.map((channel, i) => Math.round(channel + (b[i] - channel) * (at % 1))) as Rgb;
}

start().catch((error: unknown) => {
  const message = find("#message");
  message.hidden = false;
  message.textContent = `This page can't be shown: ${error instanceof Error ? error.message : String(error)}`;
  throw error;
});
