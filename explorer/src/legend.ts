// The legend: the tree of types with counts, or the values of a column. Pointing lights cells up, a click folds.

import { count, element, swatch } from "./dom";
import type { Tree } from "./tree";

export interface LegendActions {
  hover(value: number | null): void;
  pin(value: number): void;
}

export class TreeLegend {
  readonly root = element("div", { id: "tree" });
  private readonly open = new Set<number>();
  private readonly rows = new Map<number, HTMLElement>();

  constructor(private readonly tree: Tree, private readonly counts: Uint32Array, private readonly actions: LegendActions) {
    this.root.setAttribute("role", "tree");
    const present = tree.nodes.filter((_, i) => counts[i]).length;
    tree.nodes.forEach((_, i) => {
      if (tree.depth[i] < (present > 45 ? 2 : 9)) this.open.add(i);
    });
    this.root.addEventListener("pointerleave", () => actions.hover(null));
    this.render();
  }

  /** The row of `node`, unfolded into view. */
  show(node: number): void {
    for (let up = this.tree.nodes[node].parent; up >= 0; up = this.tree.nodes[up].parent) this.open.add(up);
    this.render();
    this.rows.get(this.merged(node))?.scrollIntoView({ block: "nearest" });
  }

  mark(pinned: number | null): void {
    for (const [node, row] of this.rows) row.classList.toggle("pinned", pinned !== null && this.merged(pinned) === node);
  }

  /** A node whose only child says the same name is shown as that child. */
  private merged(node: number): number {
    const below = this.tree.children[node].filter((child) => this.counts[child]);
    const same = below.length === 1 && this.tree.name(below[0]) === this.tree.name(node) && this.counts[below[0]] === this.counts[node];
    return same ? this.merged(below[0]) : node;
  }

  private render(): void {
    this.rows.clear();
    this.root.replaceChildren(...this.below(0));
    const unknown = this.counts[0] - this.tree.children[0].reduce((sum, child) => sum + this.counts[child], 0);
    if (unknown) this.root.append(this.row(0, "no label", unknown, []));
  }

  private below(node: number): HTMLElement[] {
    return this.tree.children[node].filter((child) => this.counts[child]).map((child) => {
      const shown = this.merged(child);
      const children = this.tree.children[shown].filter((next) => this.counts[next]);
      const open = this.open.has(shown);
      return this.row(shown, this.tree.name(shown), this.counts[shown], children.length ? [open, () => this.below(shown)] : []);
    });
  }

  private row(node: number, name: string, cells: number, fold: [] | [boolean, () => HTMLElement[]]): HTMLElement {
    const mark = element("button", { className: "dot", title: "keep lit up" }, swatch(this.tree.nodes[node].colour));
    mark.setAttribute("aria-label", `keep ${name} lit up`);
    const text = element(
      "button",
      { className: "name", title: this.title(node) },
      element("span", { className: "fold" }, fold.length ? (fold[0] ? "▾" : "▸") : ""),
      element("span", { className: "text" }, name),
      element("span", { className: "count" }, count(cells)),
    );
    const line = element("div", { className: "row" }, mark, text);
    const row = element("div", { className: "branch" }, line);
    row.setAttribute("role", "treeitem");
    mark.addEventListener("click", () => this.actions.pin(node));
    for (const event of ["pointerenter", "focusin"]) line.addEventListener(event, () => this.actions.hover(node));
    line.addEventListener("focusout", () => this.actions.hover(null));
    this.rows.set(node, line);
    if (fold.length) {
      const [open, below] = fold;
      row.setAttribute("aria-expanded", String(open));
      text.addEventListener("click", () => {
        if (open) this.open.delete(node);
        else this.open.add(node);
        this.render();
        this.rows.get(node)?.querySelector<HTMLElement>(".name")?.focus();
      });
      if (open) row.append(element("div", { className: "below" }, ...below()));
    } else {
      text.addEventListener("click", () => this.actions.pin(node));
    }
    return row;
  }

  private title(node: number): string {
    const { id, synonyms } = this.tree.nodes[node];
    return [this.tree.names(node).join(" › "), id, synonyms.slice(0, 6).join("; ")].filter(Boolean).join("\n");
  }
}

/** The values of a text column, most cells first. */
export function valuesLegend(values: string[], colours: string[], codes: ArrayLike<number>, actions: LegendActions): HTMLElement {
  const counts = new Uint32Array(values.length + 1);
  for (let i = 0; i < codes.length; i++) counts[codes[i]]++;
  const order = [...counts.keys()].filter((code) => counts[code]).sort((a, b) => counts[b] - counts[a]);
  const root = element("div", { id: "values" });
  root.addEventListener("pointerleave", () => actions.hover(null));
  for (const code of order) {
    const name = code ? values[code - 1] : "missing";
    const row = element(
      "button",
      { className: "row" },
      swatch(colours[code]),
      element("span", { className: "text" }, name),
      element("span", { className: "count" }, count(counts[code])),
    );
    row.addEventListener("pointerenter", () => actions.hover(code));
    row.addEventListener("click", () => actions.pin(code));
    root.append(row);
  }
  return root;
}

export function numbersLegend(low: number, high: number, colours: string[]): HTMLElement {
  const ramp = element("div", { className: "ramp" });
  ramp.style.background = `linear-gradient(90deg, ${colours.join(", ")})`;
  const say = (value: number) => value.toLocaleString("en", { maximumSignificantDigits: 4 });
  return element("div", { id: "values" }, ramp, element("p", { className: "ends" }, element("span", null, say(low)), element("span", null, say(high))));
}
