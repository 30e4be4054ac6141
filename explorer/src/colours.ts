// Colours of cells: of categories, of numbers, and of cells that are greyed out.

import { type RGBColor, rgb } from "d3-color";
import { piecewise } from "d3-interpolate";
import { SHAPES } from "./points";

export const RAMP = ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"]; // viridis
const CATEGORIES = [
  "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9",
  "#b8a000", "#8c6bb1", "#7f5539", "#2a9d8f", "#e76f51", "#8ab17d",
];

export const category = (i: number) => CATEGORIES[i % CATEGORIES.length];

const viridis = piecewise(RAMP);

export const ramp = (share: number) => viridis(Math.min(1, Math.max(0, share)));

export interface Look {
  isLit: (row: number) => boolean;
  shapeOf: (row: number) => keyof typeof SHAPES;
  colourOf: (row: number) => string;
}

/** Red, green, blue and shape of n cells, (n, 4). */
export function paint(n: number, { isLit, shapeOf, colourOf }: Look): Uint8Array {
  const parsed = new Map<string, RGBColor>();
  const colours = new Uint8Array(4 * n);
  for (let row = 0; row < n; row++) {
    const text = isLit(row) ? colourOf(row) : "grey";
    const colour = parsed.get(text) ?? rgb(text);
    parsed.set(text, colour);
    colours.set([colour.r, colour.g, colour.b, SHAPES[isLit(row) ? shapeOf(row) : "grey"]], 4 * row);
  }
  return colours;
}
