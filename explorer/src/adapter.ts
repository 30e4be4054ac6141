// The forward pass of the package's FractalAdapter, in float32: vectors of the embedding -> fractal vectors.

import type { About, Matrix } from "./data";
import { length, normalize, products, softmax } from "./matrix";

/** Abramowitz and Stegun 7.1.26, to 1.5e-7: as exact as float32. */
function erf(x: number): number {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - series * Math.exp(-x * x));
}

const gelu = (x: number) => 0.5 * x * (1 + erf(x * Math.SQRT1_2));

export class Adapter {
  readonly dim: number; // of the embedding
  readonly width: number; // of the full vector
  private readonly weights: Record<string, Float32Array> = {};
  private readonly paths: number;
  private readonly meanSquares: Float64Array; // of the class means, (paths,)

  constructor(private readonly config: About["adapter"], arrays: Record<string, Matrix>) {
    for (const [name, { values }] of Object.entries(arrays)) this.weights[name] = Float32Array.from(values);
    this.dim = arrays.mean.shape[0];
    this.width = config.levels * config.scaleDim;
    this.paths = arrays.path_anchors.shape[0];
    normalize(this.weights.path_anchors, arrays.path_anchors.shape[1]);
    normalize(this.weights.anchors, config.scaleDim);
    const means = this.weights.class_means;
    this.meanSquares = Float64Array.from({ length: this.paths }, (_, p) => length(means, p * this.dim, this.dim) ** 2);
  }

  /** x (n, inputs) -> (n, outputs) */
  private layer(x: Float32Array, inputs: number, weight: string, bias?: string): Float32Array {
    const y = products(x, this.weights[weight], inputs);
    if (!bias) return y;
    const shift = this.weights[bias];
    return y.map((value, i) => value + shift[i % shift.length]);
  }

  /** x (n, dim) -> the full vectors (n, width), of length 1 */
  forward(x: Float32Array): Float32Array {
    const { dim, paths, weights } = this;
    const n = x.length / dim;
    const centred = normalize(x.slice(), dim).map((value, i) => value - weights.mean[i % dim]);
    const whitened = this.layer(centred, dim, "axes");
    const unit = normalize(whitened.slice(), dim);
    const cosines = this.layer(this.query(unit), weights.path_anchors.length / paths, "path_anchors");
    const inner = this.layer(whitened, dim, "class_means");
    const full = new Float32Array(n * this.width);
    for (let i = 0; i < n; i++) {
      const square = length(whitened, i * dim, dim) ** 2;
      const logits = Float64Array.from({ length: paths }, (_, p) => cosines[i * paths + p] / this.config.tau);
      const distances = this.meanSquares.map((meanSquare, p) => square - 2 * inner[i * paths + p] + meanSquare);
      const own = unit.subarray(i * dim, (i + 1) * dim);
      this.blocks(this.probabilities(logits, distances), own, full.subarray(i * this.width));
    }
    return normalize(full, this.width);
  }

  /** The perceptron, with a linear map beside it: whitened cells of length 1 (n, dim) -> (n, query) of length 1. */
  private query(unit: Float32Array): Float32Array {
    const { dim, weights } = this;
    const entries = unit.map((value) => value * Math.sqrt(dim)); // of about 1
    const hidden = weights.mlp_0_bias.length;
    const first = this.layer(entries, dim, "mlp_0_weight", "mlp_0_bias").map(gelu);
    const second = this.layer(first, hidden, "mlp_1_weight", "mlp_1_bias").map(gelu);
    const linear = this.layer(entries, dim, "linear");
    const sum = this.layer(second, hidden, "mlp_2_weight", "mlp_2_bias").map((value, i) => value + linear[i]);
    return normalize(sum, weights.mlp_2_bias.length);
  }

  /** Of each path: the network's, averaged with those of the (squared) distances to the class means. */
  private probabilities(logits: Float64Array, distances: Float64Array): Float64Array {
    const { typicalDistance, meansTemperature, meansShare } = this.config;
    const nearest = distances.reduce((a, b) => Math.min(a, b));
    const temperature = Math.max(1, nearest / typicalDistance) ** 2; // higher in a cell that is far from all means
    const byNetwork = softmax(logits.map((logit) => logit / temperature));
    const prior = this.weights.log_prior;
    const byMeans = softmax(distances.map((distance, p) => (prior[p] - distance / (2 * meansTemperature)) / temperature));
    return byNetwork.map((share, p) => share + meansShare * (byMeans[p] - share));
  }

  /** Probabilities of the paths, and the whitened cell of length 1 -> the cell's blocks, into `out`. */
  private blocks(probability: Float64Array, unit: Float32Array, out: Float32Array): void {
    const { levels, scaleDim, classes, blockScale, residualScale, sharpness } = this.config;
    const { anchors, paths } = this.weights;
    const kept = Math.min(scaleDim, Math.ceil(this.dim / levels)); // numbers of the cell in a block
    let before = 0; // anchors of the levels above
    for (let j = 0; j < levels; j++) {
      const ofClass = new Float64Array(classes[j]).fill(1e-9);
      probability.forEach((share, p) => (ofClass[paths[p * levels + j]] += share));
      const sharp = ofClass.map((share) => share ** sharpness[j]);
      const sum = sharp.reduce((a, b) => a + b);
      for (let k = 0; k < scaleDim; k++) {
        const anchor = sharp.reduce((mean, share, c) => mean + (share / sum) * anchors[(before + c) * scaleDim + k], 0);
        const from = (levels - 1 - j) * kept + k; // the first numbers of the cell are in the last block
        out[j * scaleDim + k] = blockScale[j] * anchor + residualScale[j] * (k < kept ? (unit[from] ?? 0) : 0);
      }
      before += classes[j];
    }
  }
}
