// The state of the page, and what a person can do. Each action ends in `changed`, which draws what depends on it.

import { rollup } from "d3-array";
import { addressOf } from "./address";
import { STATUSES, type Vote } from "./annotator";
import { category, paint, ramp } from "./colours";
import { type About, type CellColumn, type CellSet, cellsOf, type Matrix, type Vectors } from "./data";
import { labelled, type Yours } from "./dropped";
import { readFile } from "./files";
import { count, find } from "./format";
import { apart, type Island, islands } from "./islands";
import { type Hit, MapView } from "./map";
import { rowOf } from "./matrix";
import type { Nearness } from "./near";
import type { Neighbours } from "./neighbours";
import { combine, type Mode, type Selection } from "./selection";
import { Tree } from "./tree";

export const NEAREST = 15;
const WIDE = 0.3; // radius of an island of a column's value, in units of the map
export const TABS = { types: "Types", genes: "Genes", cell: "Cell", group: "Group", yours: "Your cells" };

export const isTab = (tab: string | null): tab is string => tab !== null && Object.hasOwn(TABS, tab);

export class Page {
  readonly tree: Tree;
  readonly cells: CellSet;
  readonly counts: Uint32Array; // of cells at or below each node
  /** Per level, what tables of neighbours count: `guess` of each cell of the page, and how many have it. */
  readonly guesses: { labels: number[]; cells: Map<number, number> }[];
  readonly map: MapView;
  vectors: Vectors | null = null; // null while they are unpacked
  cell: Hit | null = null;
  selection: Selection | null = null;
  mode: Mode = "new"; // of the next selection
  near: Nearness | null = null; // the neighbours of the group, when they were last asked for
  nearLevel: number; // of the labels that are compared among them
  second: MapView | null = null; // beside the map, at another prefix or by the raw vectors; made when it is first shown
  isSecondShown = false;
  yours: Yours | null = null;
  reading: { note: string; share: number } | null = null; // of a file, and how much is done
  error = ""; // of the last file
  tip: { hit: Hit; x: number; y: number } | null = null;
  tab = "types";
  colour = "prefix"; // what colours the cells: "prefix", "level:2" or "column:donor"
  ticked: ReadonlySet<number> = new Set(); // that are lit up: codes of the column, or nodes; -5: those that stop at node 5
  hovered: number | null = null; // the one that is lit up meanwhile
  query = ""; // text that types are searched for
  readonly unfolded = new Set<number>();
  private readonly slider = find<HTMLInputElement>("#slider");
  private readonly islandsOf = new Map<string, Island[]>();
  private readonly painted = memo<void>();
  private readonly nearest = memo<Record<"fractal" | "raw", Neighbours> | null>();

  /** show: draws the panels beside the map. */
  constructor(readonly about: About, arrays: Record<string, Matrix>, private readonly show: () => void) {
    const tree = (this.tree = new Tree(about.nodes, about.known ? "no label" : "no answer"));
    this.nearLevel = about.levels.length;
    this.cells = cellsOf(about, arrays);
    this.counts = tree.counts(this.cells.node);
    this.guesses = about.levels.map((_, k) => {
      const labels = Array.from(this.cells.node, (_, row) => this.guess({ layer: 0, row }, k + 1));
      return { labels, cells: rollup(labels, (of) => of.length, (label) => label) };
    });
    this.map = this.newMap("#points", "#overlay");
    const stops = about.widths.length;
    this.slider.max = String(stops);
    this.slider.style.width = `calc(${(100 * (stops - 1)) / stops}% + 16px)`; // from the middle of the first stop to the last's
  }

  private newMap(points: string, overlay: string): MapView {
    const map = new MapView(find(points), find(overlay), this);
    map.add(this.cells.layouts, this.colours(0));
    if (this.yours) map.add(this.yours.layouts, this.colours(1));
    return map;
  }

  private get maps(): MapView[] {
    return this.second ? [this.map, this.second] : [this.map];
  }

  /** Show the same cells at another prefix beside the map, or by the raw vectors; null: no longer. */
  showSecond(prefix: number | null): void {
    this.isSecondShown = prefix !== null;
    find("#second").hidden = !this.isSecondShown;
    if (prefix !== null) {
      this.second ??= this.newMap("#points2", "#overlay2");
      this.second.resize();
      this.second.morph(prefix, true, () => this.show());
    }
    this.changed();
  }

  /** Set parts of the state, and draw what depends on it. */
  update(changes: Partial<Page>): void {
    Object.assign(this, changes);
    this.changed();
  }

  private changed(): void {
    this.painted([this.colour, this.level, this.ticked, this.hovered, this.selection, this.tab, this.yours, this.second], () => {
      const layers = (this.yours ? [0, 1] : [0]).map((layer) => this.colours(layer));
      for (const map of this.maps) layers.forEach((colours, layer) => map.setColours(layer, colours));
    });
    for (const map of this.maps) map.draw();
    this.show();
    this.remember();
  }

  /** The cells of a layer of the map. */
  set(layer: number): CellSet {
    return layer ? this.yours! : this.cells;
  }

  // --- colours -----------------------------------------------------------------------------------------------------

  /** The level (1, 2, ...) that colours the cells; null where a column does. */
  get level(): number | null {
    if (this.column) return null;
    return this.colour === "prefix" ? this.levelOf(this.stop) : Number(this.colour.split(":")[1]);
  }

  levelOf(prefix: number): number {
    return this.about.levels.indexOf(this.about.blocks[prefix - 1]) + 1;
  }

  /** The column that tells studies or donors apart. */
  get study(): CellColumn | undefined {
    const ofText = this.cells.columns.filter(({ values, colours }) => values && !colours);
    return ofText.find(({ name }) => /study|donor|batch|sample|dataset|patient|subject|individual|library/i.test(name));
  }

  /** The column that colours the cells, if one does; layer 1 has only those of the answers. */
  get column(): CellColumn | null {
    return this.columnOf(0) ?? (this.yours && this.columnOf(1));
  }

  private columnOf(layer: number): CellColumn | null {
    return this.set(layer).columns.find((column) => this.colour === idOf(column)) ?? null;
  }

  /** The colour of a value of the column: its code, or the number itself. */
  colourOf({ values, low, high, colours }: CellColumn, value: number): string {
    if (values ? !value : !Number.isFinite(value)) return this.about.unknown;
    if (!values) return ramp((value - low!) / (high! - low! || 1));
    return colours ? colours[value - 1] : category(value - 1);
  }

  isLit({ layer, row }: Hit): boolean {
    return this.lightOf(layer)(row);
  }

  /** Whether the cell of a row is one of those that are ticked or pointed at. */
  private lightOf(layer: number): (row: number) => boolean {
    const wanted = this.hovered === null ? [...this.ticked] : [this.hovered];
    const { node: nodes } = this.set(layer);
    const column = this.columnOf(layer);
    if (!wanted.length || (this.column && !column)) return () => true;
    if (column) return (row) => wanted.includes(column.codes[row]);
    const { tree } = this;
    const tops = wanted.filter((value) => value > 0);
    const stops = new Set(wanted.filter((value) => value <= 0).flatMap((value) => this.chain(-value)));
    const isLit = tree.nodes.map((_, node) => stops.has(node) || tops.some((top) => tree.isBelow(node, top)));
    return (row) => isLit[nodes[row]];
  }

  /** (n, 4), see `paint`. */
  private colours(layer: number): Uint8Array {
    const { tree } = this;
    const { node: nodes, answers } = this.set(layer);
    const light = this.lightOf(layer);
    const group = this.selection && new Set(this.selection.rows[layer]);
    const isGroupAlone = group && (this.tab === "group" || this.tab === "cell");
    const column = this.columnOf(layer);
    const level = this.level ?? this.about.levels.length;
    return paint(nodes.length, {
      isLit: (row) => (isGroupAlone ? group.has(row) : light(row) || (this.hovered === null && group?.has(row) === true)),
      shapeOf: (row) => {
        if (answers && STATUSES[answers.status[row]] === "novel") return "diamond";
        return answers && !column && nodes[row] > 0 && tree.depth(nodes[row]) < level ? "ring" : "disc";
      },
      colourOf: (row) => (column ? this.colourOf(column, column.codes[row]) : tree.nodes[tree.at(nodes[row], level)].colour),
    });
  }

  /** What can colour the cells: ids, and names. */
  get colourings(): Map<string, string> {
    const columns = [...this.cells.columns, ...(this.yours?.columns ?? [])];
    return new Map([
      ["prefix", "the level of the slider"],
      ...this.about.levels.map((level, k): [string, string] => [`level:${k + 1}`, level]),
      ...columns.map((column): [string, string] => [idOf(column), column.name]),
    ]);
  }

  colourBy(colour: string): void {
    this.colour = this.colourings.has(colour) ? colour : "prefix";
    if (this.colour.startsWith("level:")) this.openTree();
    this.tick([]);
  }

  /** Light up these nodes, or values of the column that colours. */
  tick(values: number[]): void {
    this.update({ ticked: new Set(values), hovered: null });
  }

  hover(hovered: number | null): void {
    if (hovered !== this.hovered) this.update({ hovered });
  }

  /** Open or close a node; opening it moves to the prefix that tells those below it apart. */
  fold(node: number, isOpen: boolean): void {
    const chain = this.chain(node);
    for (const one of chain) isOpen ? this.unfolded.delete(one) : this.unfolded.add(one);
    const prefix = this.about.blocks.indexOf(this.levelBelow(node)) + 1;
    if (prefix && !isOpen) this.setPrefix(prefix, true, false);
    this.show();
  }

  search(query: string): void {
    if (this.column) this.colourBy("prefix");
    this.update({ query, tab: "types" });
  }

  /** Show a type in the legend and on the map. */
  showType(node: number): void {
    this.search("");
    for (const above of this.tree.above(node)) this.unfolded.add(above);
    this.tick([node]);
    document.querySelector("#tree .ticked")?.scrollIntoView({ block: "nearest" });
    const { node: nodes } = this.cells;
    this.map.frame(0, [...nodes.keys()].filter((row) => this.tree.isBelow(nodes[row], node)));
  }

  /** Where most cells of a node of the level lie, or of a value of the text column that colours. */
  islands(prefix: number): Island[] {
    const { tree, islandsOf } = this;
    const column = this.columnOf(0)?.values ? this.columnOf(0) : null;
    const level = (this.colour !== "prefix" && this.level) || this.levelOf(prefix > this.about.widths.length ? this.stop : prefix);
    const key = `${prefix} ${column ? this.colour : level}`;
    if (!islandsOf.has(key)) {
      const groups = column?.codes ?? this.cells.node.map((node) => (tree.depth(node) < level ? 0 : tree.at(node, level)));
      const nameOf = (value: number) => (column ? valueOf(column, value) : this.label(value));
      const all = islands(this.cells.layouts[prefix - 1], groups, Math.max(5, this.about.cells / 1000), nameOf);
      islandsOf.set(key, column ? all.filter(({ radius }) => radius < WIDE) : all); // a donor may be all over the map
    }
    return islandsOf.get(key)!;
  }

  // --- labels ------------------------------------------------------------------------------------------------------

  /** The nodes below a node that have cells. */
  readonly childrenOf = (node: number): number[] => this.tree.children[node].filter((child) => this.counts[child] > 0);

  chain(node: number): number[] {
    return this.tree.chain(node, this.childrenOf);
  }

  /** The level of the nodes that stand below a node in the tree. */
  levelBelow(node: number): string {
    return this.about.levels[this.tree.depth(this.chain(node).at(-1)!)];
  }

  /** The name of a node, with its level where another row of the tree has the same name. */
  label(node: number): string {
    const { parent } = this.tree.nodes[node];
    const isRepeat = parent > 0 && this.tree.name(parent) === this.tree.name(node) && !this.chain(parent).includes(node);
    return this.tree.name(node) + (isRepeat ? ` (${this.about.levels[this.tree.depth(node) - 1]})` : "");
  }

  /** What is ticked or pointed at in the legend, in words. */
  nameOf(value: number): string {
    if (this.column) return valueOf(this.column, value);
    return value < 0 ? `${this.label(-value)}, no answer at the ${this.levelBelow(-value)}` : this.label(value);
  }

  /** The best guess for a cell at a level, however unsure; or the label of the file. */
  guess({ layer, row }: Hit, level: number): number {
    const { answers, node: nodes } = this.set(layer);
    return answers ? this.about.annotator.paths[answers.path[row]][level - 1] : this.tree.at(nodes[row], level);
  }

  /** The share of the neighbours of a cell with a label that can have it: below 1 where few others on the map do. */
  readonly mostSame = (label: number, level: number, layer = 0): number =>
    Math.min(1, ((this.guesses[level - 1].cells.get(label) ?? 0) - (layer ? 0 : 1)) / NEAREST);

  // --- the prefix --------------------------------------------------------------------------------------------------

  /** The prefix that is nearest to the slider's position. */
  get stop(): number {
    return Math.round(this.map?.prefix ?? 1);
  }

  /** "prefix 2", "full vector" for the last, and "raw vector" for the map behind it. */
  prefixName(prefix = this.stop): string {
    const last = this.about.widths.length;
    return prefix > last ? "raw vector" : prefix === last ? "full vector" : `prefix ${prefix}`;
  }

  /** What the second map can show, a prefix and its name each. */
  get secondMaps(): [number, string][] {
    return this.cells.layouts.map((_, j) => {
      const level = this.about.blocks[j];
      return [j + 1, level ? `${level}, ${this.prefixName(j + 1)}` : `${this.prefixName(j + 1)}, as it came`];
    });
  }

  /** opensTree: the tree is opened to the level of the prefix. */
  setPrefix(prefix: number, smooth = true, opensTree = true): void {
    let before = this.stop;
    this.map.morph(Math.min(this.about.widths.length, Math.max(1, prefix)), smooth, () => {
      this.slider.value = String(this.map.prefix);
      if (this.stop === before) return;
      before = this.stop;
      if (opensTree) this.openTree();
      this.changed();
    });
  }

  /** The prefix with the most islands that lie apart. */
  get firstPrefix(): number {
    const counts = this.about.widths.map((_, j) => apart(this.islands(j + 1)));
    return counts.indexOf(Math.max(...counts)) + 1;
  }

  /** To the level that colours the cells. */
  openTree(): void {
    const { tree, unfolded } = this;
    const level = this.level ?? this.levelOf(this.stop);
    unfolded.clear();
    tree.nodes.forEach((_, node) => tree.depth(node) < level && unfolded.add(node));
  }

  // --- a cell ------------------------------------------------------------------------------------------------------

  choose(hit: Hit | null): void {
    if (hit?.layer && this.yours!.answers.path[hit.row] < 0) return; // it has no position
    this.update({ cell: hit, tab: hit ? "cell" : this.tab });
    find("#cell").scrollTop = 0;
  }

  /** The pointer is at a cell, at a pixel of the views. */
  pointAt(hit: Hit | null, x = 0, y = 0): void {
    if (!hit && !this.tip) return;
    this.tip = hit && { hit, x, y };
    this.show();
  }

  /** By the prefix, and by the vector as it came. */
  neighbours({ layer, row }: Hit, prefix: number, k = NEAREST): Record<"fractal" | "raw", Neighbours> {
    const { fractal, raw } = this.vectors!;
    const except = layer ? -1 : row;
    const [ofFull, ofRaw] = layer ? [this.yours!.full, this.yours!.raw] : [fractal.rows, raw.rows];
    return {
      fractal: fractal.search(rowOf(ofFull, row, fractal.dim), k, [this.about.widths[prefix - 1]], except)[0][0],
      raw: raw.search(rowOf(ofRaw, row, raw.dim), k, [raw.dim], except)[0][0],
    };
  }

  get cellNeighbours(): Record<"fractal" | "raw", Neighbours> | null {
    const { cell, stop, vectors } = this;
    return this.nearest([cell, stop, vectors], () => cell && vectors && this.neighbours(cell, stop));
  }

  /** The votes for each level's label of a cell; null while the vectors are unpacked. */
  votes({ layer, row }: Hit): Vote[][] | null {
    const rows = layer ? this.yours!.full : this.vectors?.fractal.rows;
    return rows ? this.vectors!.annotator.votes(rowOf(rows, row, this.vectors!.fractal.dim)) : null;
  }

  /** A cell in words: title, name and colour of its label, and lines of name and value. */
  describe({ layer, row }: Hit): { title: string; name: string; colour: string; lines: [string, string][] } {
    const { names, node: nodes, answers, columns } = this.set(layer);
    const none = answers ? "no answer" : "no label";
    const { name, colour } = this.tree.nodes[nodes[row]];
    const ofFile = columns.filter((column) => (column.unit ? this.colour === idOf(column) : !column.isOfAnswer));
    const lines = ofFile.map((column): [string, string] => [column.name, textOf(column, row) || "–"]);
    const title = `${layer ? "your " : ""}${names ? names[row] : `cell ${count(row + 1)}`}`;
    return { title, name: name || none, colour, lines: [["path", this.tree.path(nodes[row]) || none], ...lines] };
  }

  // --- a group -----------------------------------------------------------------------------------------------------

  get group(): number[] | null {
    return this.selection && this.selection.rows[0];
  }

  /** Select the cells within corners, x and y in turn, on a map; null: none, and the selection is dropped. */
  select(corners: number[] | null, map = this.map): void {
    this.lassoMode(false);
    for (const other of this.maps) other.setLasso(null);
    if (corners) {
      const isOnly = !this.selection || this.mode === "new";
      const prefix = Number(map.prefix.toFixed(2));
      const where = prefix > this.about.widths.length ? "on the map of the raw vectors" : `at prefix ${prefix}`;
      const at = `in a lasso ${where}: ${corners.join(" ")}`;
      this.selectCells([map.inside(0, corners), this.yours ? map.inside(1, corners) : []], at);
      if (isOnly) map.setLasso(corners);
      this.remember();
    } else this.update({ selection: null, mode: "new" });
  }

  /** Select rows, by the mode; the rule says what they have in common. */
  selectCells(rows: [number[], number[]], rule: string): void {
    for (const map of this.maps) map.setLasso(null);
    this.update({ selection: combine(this.selection, { rows, rule }, this.mode), tab: "group" });
  }

  /** Select the cells that are ticked in the legend, and take the ticks away. */
  selectTicked(): void {
    const lit = (layer: number) => [...this.set(layer).node.keys()].filter(this.lightOf(layer));
    this.selectCells([lit(0), this.yours ? lit(1) : []], this.ticks);
    this.tick([]);
  }

  /** Select cells by name, or by row where the cells have no names. */
  selectNamed(names: string[]): void {
    const wanted = new Set(names);
    const rows = [...this.cells.node.keys()].filter((row) => wanted.has(this.cells.names?.[row] ?? String(row)));
    this.selectCells([rows, []], `named in the address: ${count(rows.length)} of ${count(wanted.size)} are here`);
  }

  /** What is ticked, in words. */
  get ticks(): string {
    const names = [...this.ticked].map((value) => this.nameOf(value));
    return `${this.column ? `with ${this.column.name}` : "labelled"} ${names.join(" or ")}`;
  }

  lassoMode(isOn = !this.map.isDrawing): void {
    for (const map of this.maps) map.isDrawing = isOn;
    this.show();
  }

  // --- cells that are dropped --------------------------------------------------------------------------------------

  async take(file: File): Promise<void> {
    if (!this.vectors) return;
    const { annotator } = this.vectors;
    const reading = { note: `Reading ${file.name} …`, share: 0 };
    this.update({ reading, error: "", tab: "yours" });
    try {
      const content = await readFile(file, annotator.adapter.dim, this.about.facts.Vectors);
      reading.note = `Labelling ${count(content.vectors.length / annotator.adapter.dim)} cells of ${file.name} …`;
      const yours = await labelled(file.name, content, this.about, this.vectors, this.cells.layouts, (share) => {
        reading.share = share;
        this.show();
        return this.reading === reading; // else it was stopped, or another file was dropped
      });
      if (!yours) return;
      this.forget();
      this.yours = yours;
      for (const map of this.maps) {
        map.add(yours.layouts, this.colours(1));
        map.frame(1, [...yours.node.keys()]);
      }
    } catch (error) {
      if (this.reading !== reading) return;
      this.error = `${file.name}: ${error instanceof Error ? error.message : "can't be read"}`;
    }
    this.update({ reading: null });
  }

  /** Remove the cells that were dropped. */
  forget(): void {
    const { cell, selection } = this;
    const ofPage = selection && { ...selection, rows: [selection.rows[0], []] as Selection["rows"] };
    this.update({ cell: cell?.layer ? null : cell, tip: null, yours: null, selection: ofPage });
    for (const map of this.maps) map.removeFrom(1);
  }

  // --- tabs, and the address ---------------------------------------------------------------------------------------

  /** Let go of one thing: the lasso, the cell, the group or the type. */
  clear(): void {
    if (this.map.isDrawing) this.lassoMode(false);
    else if (this.cell) this.choose(null);
    else if (this.selection) this.select(null);
    else this.tick([]);
  }

  /** Put the view into the address. */
  remember(): void {
    if (!this.map?.camera) return; // it is being made
    const address = addressOf(this);
    const isInline = location.protocol === "about:"; // in a notebook's iframe, which has no address
    if (!isInline && location.hash !== address) history.replaceState(null, "", address);
  }
}

const idOf = ({ name, unit }: CellColumn) => `${unit ? "gene" : "column"}:${name}`;

/** The value of a text column that has a code. */
export const valueOf = ({ values, missing }: CellColumn, code: number): string => (code ? values![code - 1] : (missing ?? "missing"));

/** The value of a cell, "" where it is missing. */
export function textOf({ values, codes }: CellColumn, row: number): string {
  const code = codes[row];
  if (values) return code ? values[code - 1] : "";
  return Number.isFinite(code) ? String(Number(code.toPrecision(4))) : "";
}

/** A result that is made anew only when one of the inputs differs from those of the last call. */
export function memo<T>(): (inputs: unknown[], make: () => T) => T {
  let last: unknown[] | null = null;
  let result: T;
  return (inputs, make) => {
    if (!last || inputs.some((input, i) => input !== last![i])) result = make();
    last = inputs;
    return result;
  };
}
