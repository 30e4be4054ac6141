// The hierarchy of labels. Nodes stand in depth-first order: those below a node follow it without a gap.

import type { TreeNode } from "./data";

export class Tree {
  readonly children: number[][];
  private readonly last: number[]; // the last node below each
  private readonly paths: number[][] = []; // from the root, which is node 0, to each node

  /** none: the name of the root, where cells without a label are. */
  constructor(readonly nodes: TreeNode[], private readonly none: string) {
    this.children = nodes.map(() => []);
    this.last = nodes.map(() => 0);
    nodes.forEach(({ parent }, node) => {
      this.paths.push(node ? [...this.paths[parent], node] : [0]);
      if (node) this.children[parent].push(node);
      for (const above of this.paths[node]) this.last[above] = node;
    });
  }

  depth(node: number): number {
    return this.paths[node].length - 1;
  }

  /** The node of level 1, 2, ... above `node`; `node` itself where it is not so deep. */
  at(node: number, level: number): number {
    return this.paths[node][Math.min(level, this.depth(node))];
  }

  isBelow(node: number, top: number): boolean {
    return node >= top && node <= this.last[top];
  }

  /** Nodes above `node`, from the root. */
  above(node: number): number[] {
    return this.paths[node].slice(0, -1);
  }

  name(node: number): string {
    return node ? this.nodes[node].name : this.none;
  }

  /** Names from level 1 down; a name that repeats the one above it is left out. "" for the root. */
  path(node: number): string {
    const names = this.paths[node].slice(1).map((step) => this.nodes[step].name);
    return names.filter((name, i) => name !== names[i - 1]).join(" › ");
  }

  /** The node, and those below it that repeat its name and have no sibling among `childrenOf`: they stand as one. */
  chain(node: number, childrenOf: (node: number) => number[]): number[] {
    const [child, sibling] = childrenOf(node);
    const isOne = child && !sibling && this.nodes[child].name === this.nodes[node].name;
    return isOne ? [node, ...this.chain(child, childrenOf)] : [node];
  }

  /** Number of cells at or below each node. */
  counts(cells: ArrayLike<number>): Uint32Array {
    const counts = new Uint32Array(this.nodes.length);
    for (let i = 0; i < cells.length; i++) counts[cells[i]]++;
    for (let node = counts.length - 1; node > 0; node--) counts[this.nodes[node].parent] += counts[node];
    return counts;
  }

  /** Nodes whose name, id or a synonym contains the text -> what matched; the best match first. */
  search(text: string): Map<number, string> {
    const wanted = text.trim().toLowerCase();
    const rank = (name: string) => {
      const start = name.toLowerCase().indexOf(wanted);
      return start < 0 ? Infinity : name.length === wanted.length ? 0 : start === 0 ? 1 : 2;
    };
    const matches = this.nodes.slice(1).map(({ name, id, synonyms }, i) => {
      const [by] = [name, id, ...synonyms].sort((a, b) => rank(a) - rank(b));
      return { node: i + 1, by, rank: rank(by) };
    });
    const best = matches.filter((match) => match.rank < Infinity).sort((a, b) => a.rank - b.rank || a.node - b.node);
    return new Map(best.map(({ node, by }) => [node, by]));
  }
}
