// The hierarchy of labels, and which of its nodes each cell is at.

import type { About, TreeNode } from "./data";

export class Tree {
  readonly nodes: TreeNode[];
  readonly depth: number[];
  readonly children: number[][];
  readonly last: number[]; // the last node below each, so that [node, last] are all below it
  private readonly ancestors: number[][]; // [node][level]: the node at that level, or the node itself above it

  constructor(about: About) {
    this.nodes = about.nodes;
    this.depth = this.nodes.map(() => 0);
    this.children = this.nodes.map(() => []);
    this.last = this.nodes.map((_, i) => i);
    this.ancestors = this.nodes.map(() => []);
    this.nodes.forEach((node, i) => {
      if (i) {
        this.depth[i] = this.depth[node.parent] + 1;
        this.children[node.parent].push(i);
      }
      for (let up = i; up >= 0; up = this.nodes[up].parent) this.last[up] = Math.max(this.last[up], i);
      const above = i ? this.ancestors[node.parent].slice(0, this.depth[i]) : [0];
      this.ancestors[i] = [...above, ...Array<number>(about.levels.length + 1 - above.length).fill(i)];
    });
  }

  /** The node of level 1, 2, ... above `node`; itself where it is not so deep. */
  at(node: number, level: number): number {
    return this.ancestors[node][level];
  }

  isBelow(node: number, top: number): boolean {
    return node >= top && node <= this.last[top];
  }

  /** Names from the root down, without those that say the same again. */
  names(node: number): string[] {
    const path: string[] = [];
    for (let up = node; up > 0; up = this.nodes[up].parent) path.unshift(this.nodes[up].name);
    return path.filter((name, i) => i === 0 || name !== path[i - 1]);
  }

  name(node: number): string {
    return node ? this.nodes[node].name : "no label";
  }

  /** How many cells are at or below each node. */
  counts(cells: ArrayLike<number>): Uint32Array {
    const counts = new Uint32Array(this.nodes.length);
    for (let i = 0; i < cells.length; i++) counts[cells[i]]++;
    for (let node = counts.length - 1; node > 0; node--) counts[this.nodes[node].parent] += counts[node];
    return counts;
  }

  /** Nodes whose name, synonym or id has the text; those that begin with it first. */
  search(text: string): { node: number; by: string }[] {
    const wanted = text.trim().toLowerCase();
    if (!wanted) return [];
    const found: { node: number; by: string; rank: number }[] = [];
    const seen = new Map<string, number>();
    this.nodes.forEach((node, i) => {
      if (!i) return;
      const rank = (name: string) => {
        const at = name.toLowerCase().indexOf(wanted);
        return at < 0 ? Infinity : name.length === wanted.length ? 0 : at === 0 ? 1 : 2;
      };
      const names = [node.name, node.id, ...node.synonyms];
      const ranks = names.map(rank);
      const best = Math.min(...ranks);
      if (best === Infinity) return;
      const by = names[ranks.indexOf(best)];
      const entry = { node: i, by: by === node.name ? "" : by, rank: best };
      // A name that is said at several levels, such as "B cell" as type and as subtype, is one entry: the coarsest.
      const key = `${node.name}\n${node.id}`;
      const before = seen.get(key);
      if (before !== undefined && this.isBelow(i, before)) return;
      seen.set(key, i);
      found.push(entry);
    });
    return found.sort((a, b) => a.rank - b.rank || a.node - b.node).slice(0, 12);
  }
}
