// The answers of `fractal annotate`: votes of neighbours -> calibrated probabilities -> a label as deep as they allow.

import { bisectLeft, cumsum, min, rollup, sum } from "d3-array";
import type { Adapter } from "./adapter";
import { ramp } from "./colours";
import type { About, CellColumn, Knots, Matrix } from "./data";
import { length, softmax } from "./matrix";
import type { Bank, Neighbours } from "./neighbours";

export const STATUSES = ["ok", "withheld", "novel", "invalid"] as const;

/** Answers for n cells. */
export interface Answers {
  path: Int32Array; // -1: the cell has no usable vector
  probability: Float64Array; // (n, levels)
  depth: Uint8Array; // levels that are answered
  pValue: Float64Array;
  status: Uint8Array; // row in STATUSES
}

/** A node, and its share of the votes. */
export interface Vote {
  node: number;
  share: number;
}

/** What the answers say, as columns that colour cells. */
export function answerColumns({ status, depth, probability, pValue }: Answers, levels: string[]): CellColumn[] {
  const ofLevel = (k: number) => Float64Array.from(status, (_, row) => probability[row * levels.length + k]);
  const colours = ["#009e73", "#e69f00", "#d81b60", "#8a8a8a"];
  return [
    { name: "status", values: [...STATUSES], colours, codes: status.map((code) => code + 1) },
    { name: "answered level", values: levels, colours: levels.map((_, k) => ramp(k / levels.length)), codes: depth },
    ...levels.map((level, k) => ({ name: `probability of the ${level}`, low: 0, high: 1, codes: ofLevel(k) })),
    { name: "p-value", low: 0, high: 1, codes: pValue },
  ];
}

/** Linear interpolation between knots, constant beyond them. */
function interpolate(x: number, [knots, values]: Knots): number {
  const high = bisectLeft(knots, x);
  if (high === 0 || high === knots.length) return values[Math.max(0, high - 1)];
  const share = (x - knots[high - 1]) / (knots[high] - knots[high - 1]);
  return values[high - 1] + share * (values[high] - values[high - 1]);
}

/** The conformal p-value of x: the share, by weight, of held-out values (ascending) that are at least as large. */
function tail(values: Float64Array, weights: Float64Array): (x: number) => number {
  const below = [0, ...cumsum(weights)];
  const total = below[weights.length];
  const mean = total / weights.length;
  return (x) => (total - below[bisectLeft(values, x)] + mean) / (total + mean);
}

const BATCH = 64; // cells at a time; their cosines to 8,000 cells are 2 MB

export class Annotator {
  private readonly votersPath: ArrayLike<number>;
  private readonly axes: ArrayLike<number>; // of the discriminant (dim, dim), one output a row
  private readonly means: ArrayLike<number>; // (types, dim), in these axes
  private readonly signalTails: ((x: number) => number)[];
  private readonly scoreTail: (x: number) => number;

  constructor(
    readonly adapter: Adapter,
    private readonly config: About["annotator"],
    readonly voters: Bank,
    arrays: Record<string, Matrix>,
  ) {
    this.votersPath = arrays.bank_path.values;
    this.axes = arrays.discriminant.values;
    this.means = arrays.discriminant_means.values;
    const [count, knots] = arrays.signals.shape;
    const row = (name: string, i: number) => arrays[name].values.subarray(i * knots, (i + 1) * knots) as Float64Array;
    this.signalTails = Array.from({ length: count }, (_, i) => tail(row("signals", i), row("signal_weights", i)));
    this.scoreTail = tail(row("ood_score", 0), row("ood_weights", 0));
  }

  /**
   * vectors (n, dim) -> answers and fractal vectors (n, width). `progress` gets the number of cells that are done, and
   * stops the work by returning false.
   */
  async answer(
    vectors: Float32Array,
    progress: (done: number) => boolean | Promise<boolean>,
  ): Promise<{ answers: Answers; full: Float32Array } | null> {
    const { dim, width } = this.adapter;
    const n = vectors.length / dim;
    const full = new Float32Array(n * width);
    const answers: Answers = {
      path: new Int32Array(n).fill(-1),
      probability: new Float64Array(n * this.config.votes.length).fill(NaN),
      depth: new Uint8Array(n),
      pValue: new Float64Array(n).fill(NaN),
      status: new Uint8Array(n).fill(STATUSES.indexOf("invalid")),
    };
    for (let start = 0; start < n; start += BATCH) {
      const end = Math.min(n, start + BATCH);
      const cell = (row: number) => vectors.subarray(row * dim, (row + 1) * dim);
      const rows = Array.from({ length: end - start }, (_, i) => start + i);
      const usable = rows.filter((row) => cell(row).every(Number.isFinite) && cell(row).some(Boolean));
      const x = new Float32Array(usable.length * dim);
      usable.forEach((row, i) => x.set(cell(row), i * dim));
      const vectorsOfUsable = this.adapter.forward(x);
      const [neighbours] = this.voters.search(vectorsOfUsable, this.config.neighbours);
      usable.forEach((row, i) => {
        full.set(vectorsOfUsable.subarray(i * width, (i + 1) * width), row * width);
        this.answerCell(cell(row), neighbours[i], row, answers);
      });
      if (!(await progress(end))) return null;
    }
    return { answers, full };
  }

  /** Put the answer for the cell (dim,) into a row of the answers. */
  private answerCell(cell: Float32Array, neighbours: Neighbours, row: number, answers: Answers): void {
    const { votes, confidence, novel, caution, cautiousDepth } = this.config;
    const { path, shares } = this.descend(neighbours);
    const probability = answers.probability.subarray(row * votes.length, (row + 1) * votes.length);
    shares.forEach((share, k) => {
      probability[k] = Math.min(k ? probability[k - 1] : 1, interpolate(share, votes[k]));
    });
    const signals = [1 - neighbours.cosines[neighbours.cosines.length - 1], ...this.discriminate(cell)];
    const pValue = this.scoreTail(-sum(signals, (value, k) => Math.log(this.signalTails[k](value)))); // Fisher's
    const confident = probability.filter((value) => value >= confidence).length;
    const depth = pValue < caution ? Math.min(confident, cautiousDepth) : confident;
    answers.path[row] = path;
    answers.depth[row] = depth;
    answers.pValue[row] = pValue;
    answers.status[row] = STATUSES.indexOf(pValue < novel ? "novel" : depth < confident ? "withheld" : "ok");
  }

  /** The votes for a cell full (width,): per level the first node and the second, with their shares. */
  votes(full: Float32Array): Vote[][] {
    const [[neighbours]] = this.voters.search(full, this.config.neighbours);
    return this.descend(neighbours).votes;
  }

  /** From the root down, the node with most votes below the one above -> their path, the share of each, and all votes. */
  private descend({ rows, cosines }: Neighbours): { path: number; shares: number[]; votes: Vote[][] } {
    const { paths, temperature } = this.config;
    const weights = softmax(Float64Array.from(cosines, (cosine) => cosine / temperature));
    let voters = rows.map((voter, i) => ({ path: this.votersPath[voter], weight: weights[i] }));
    const votes = this.config.votes.map((_, k) => {
      const sums = rollup(voters, (group) => sum(group, ({ weight }) => weight), ({ path }) => paths[path][k]);
      const sorted = [...sums].map(([node, share]) => ({ node, share })).sort((a, b) => b.share - a.share || a.node - b.node);
      voters = voters.filter(({ path }) => paths[path][k] === sorted[0].node);
      return sorted;
    });
    return { path: voters[0].path, shares: votes.map(([first]) => first.share), votes };
  }

  /** The distance of a cell (dim,) from the nearest mean, and -log of the largest probability of a type. */
  private discriminate(cell: Float32Array): [number, number] {
    const { dim } = this.adapter;
    const norm = length(cell, 0, dim);
    const x = Float64Array.from({ length: dim }, (_, o) => sum(cell, (value, k) => (value / norm) * this.axes[o * dim + k]));
    const squares = Float64Array.from({ length: this.means.length / dim }, (_, type) =>
      sum(x, (value, o) => (value - this.means[type * dim + o]) ** 2),
    );
    const nearest = min(squares)!;
    const softness = 2 * this.config.softness;
    return [Math.sqrt(nearest), Math.log(sum(squares, (square) => Math.exp((nearest - square) / softness)))];
  }
}
