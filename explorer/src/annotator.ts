// The answers of `fractal annotate`: votes of neighbours -> calibrated probabilities -> a label as deep as they allow.

import { bisectLeft, cumsum, min, rollup, sum } from "d3-array";
import type { Adapter } from "./adapter";
import type { About, Knots, Matrix } from "./data";
import { percent } from "./format";
import { length, normalize, products, rowOf, softmax, squaredDistances, take } from "./matrix";
import type { Bank, Neighbours } from "./neighbours";

export const STATUSES = ["ok", "withheld", "novel", "invalid"] as const;

/** What each status says. */
export function statusTexts({ levels, annotator: { novel, caution, cautiousDepth } }: About): string[] {
  const withheld = `no answer below the ${levels[cautiousDepth - 1]}`;
  return [
    "like the reference: answered as deep as the probabilities allow, which may be no answer",
    `unusual (p-value below ${caution}): ${withheld}, though the probabilities would allow one`,
    `like no type of the reference (p-value below ${novel}, as that of ${percent(novel)} of ordinary cells is): ${withheld}`,
    "without a usable vector: no answer",
  ];
}

/** Answers for n cells. */
export interface Answers {
  path: Int32Array; // -1: the cell has no usable vector
  probability: Float64Array; // (n, levels)
  depth: Uint8Array; // levels that are answered
  pValue: Float64Array;
  status: Uint8Array; // row in STATUSES
}

export const noAnswers = (n: number, levels: number): Answers => ({
  path: new Int32Array(n).fill(-1),
  probability: new Float64Array(n * levels).fill(NaN),
  depth: new Uint8Array(n),
  pValue: new Float64Array(n).fill(NaN),
  status: new Uint8Array(n).fill(STATUSES.indexOf("invalid")),
});

/** A node, and its share of the votes. */
export interface Vote {
  node: number;
  share: number;
}

/** Why a cell (dim,) gets no answer, as in the package; "" for one that gets one. */
export function problemOf(cell: Float32Array): string {
  if (cell.some(Number.isNaN)) return "missing numbers";
  const norm = length(cell, 0, cell.length);
  if (!Number.isFinite(Math.fround(norm ** 2))) return "infinite numbers";
  return norm < 1e-12 ? "zeros alone" : "";
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

export class Annotator {
  private readonly votersPath: ArrayLike<number>;
  private readonly axes: Float32Array; // of the discriminant (dim, dim), one output a row
  private readonly means: Float32Array; // (types, dim), in these axes
  private readonly signalTails: ((x: number) => number)[];
  private readonly scoreTail: (x: number) => number;

  constructor(
    readonly adapter: Adapter,
    private readonly config: About["annotator"],
    readonly voters: Bank,
    arrays: Record<string, Matrix>,
  ) {
    this.votersPath = arrays.bank_path.values;
    this.axes = Float32Array.from(arrays.discriminant.values);
    this.means = Float32Array.from(arrays.discriminant_means.values);
    const [count, knots] = arrays.signals.shape;
    const row = (name: string, i: number) => arrays[name].values.subarray(i * knots, (i + 1) * knots) as Float64Array;
    this.signalTails = Array.from({ length: count }, (_, i) => tail(row("signals", i), row("signal_weights", i)));
    this.scoreTail = tail(row("ood_score", 0), row("ood_weights", 0));
  }

  /** cells (n, dim), some 64 at a time -> answers, and fractal vectors (n, width), 0 where there is no answer. */
  answer(cells: Float32Array): { answers: Answers; full: Float32Array } {
    const { dim, width } = this.adapter;
    const answers = noAnswers(cells.length / dim, this.config.votes.length);
    const full = new Float32Array(answers.path.length * width);
    const rows = [...answers.path.keys()].filter((row) => !problemOf(rowOf(cells, row, dim)));
    const usable = take(cells, rows, dim);
    const vectors = this.adapter.forward(usable);
    const [neighbours] = this.voters.search(vectors, this.config.neighbours);
    const unlike = this.discriminate(usable);
    rows.forEach((row, i) => {
      full.set(rowOf(vectors, i, width), row * width);
      this.answerCell(neighbours[i], unlike[i], row, answers);
    });
    return { answers, full };
  }

  /** Put the answer for a cell into a row of the answers. */
  private answerCell(neighbours: Neighbours, unlike: number[], row: number, answers: Answers): void {
    const { votes, confidence, novel, caution, cautiousDepth } = this.config;
    const { path, shares } = this.descend(neighbours);
    const probability = answers.probability.subarray(row * votes.length, (row + 1) * votes.length);
    shares.forEach((share, k) => {
      probability[k] = Math.min(k ? probability[k - 1] : 1, interpolate(share, votes[k]));
    });
    const signals = [1 - neighbours.cosines[neighbours.cosines.length - 1], ...unlike];
    const pValue = this.scoreTail(sum(signals, (value, k) => Math.log(this.signalTails[k](value)) ** 2));
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

  /** Of cells (n, dim): the distance from the nearest mean, and -log of the largest probability of a type. */
  private discriminate(cells: Float32Array): number[][] {
    const { dim } = this.adapter;
    const x = products(normalize(cells.slice(), dim), this.axes, dim);
    const squares = squaredDistances(x, this.means, dim);
    const types = this.means.length / dim;
    return Array.from({ length: cells.length / dim }, (_, i) => {
      const ofCell = rowOf(squares, i, types);
      const nearest = min(ofCell)!;
      const ambiguity = Math.log(sum(ofCell, (square) => Math.exp((nearest - square) / (2 * this.config.softness))));
      return [Math.sqrt(nearest), ambiguity];
    });
  }
}
