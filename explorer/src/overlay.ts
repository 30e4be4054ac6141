// What is drawn over the cells: names of islands, lines, rings. Points are pixels of the screen.

import { ticks } from "d3-array";
import type { Camera, Point } from "./camera";
import type { Island } from "./islands";

type Context = CanvasRenderingContext2D;

export function drawLine(context: Context, points: Point[], strokeStyle: string, lineWidth: number, dashes: number[]): void {
  context.beginPath();
  for (const point of points) context.lineTo(...point);
  context.setLineDash(dashes);
  Object.assign(context, { strokeStyle, lineWidth }).stroke();
  context.setLineDash([]);
}

export function drawRing(context: Context, point: Point, radius: number, strokeStyle: string, lineWidth: number): void {
  context.beginPath();
  context.arc(...point, radius, 0, 2 * Math.PI);
  Object.assign(context, { strokeStyle, lineWidth }).stroke();
}

export const RING = 8; // pixels, radius of that around the chosen cell

export type Box = [number, number, number, number]; // left, top, right, bottom

const SQUARE = 8; // pixels; a name keeps off squares in which cells lie

/** Whether cells, (n, 2) per layer, lie in a box. */
function cellsIn(camera: Camera, layers: Float32Array[]): (box: Box) => boolean {
  const columns = Math.ceil(camera.width / SQUARE);
  const squares = new Uint8Array(columns * Math.ceil(camera.height / SQUARE));
  const [[left, top], scale] = [camera.toScreen([0, 0]), camera.scale];
  for (const positions of layers) {
    for (let i = 0; i < positions.length; i += 2) {
      const [x, y] = [left + scale * positions[i], top - scale * positions[i + 1]];
      if (x >= 0 && x < camera.width && y >= 0 && y < camera.height) {
        squares[Math.floor(y / SQUARE) * columns + Math.floor(x / SQUARE)] = 1;
      }
    }
  }
  return (box) => {
    const [x0, y0, x1, y1] = box.map((edge) => Math.floor(edge / SQUARE));
    for (let y = y0; y <= y1; y++) {
      for (let x = x0; x <= x1; x++) if (squares[y * columns + x]) return true;
    }
    return false;
  };
}

const NEAR = 0.1; // of the map: a type in several islands has its name beside the largest

/** Around an island, the nearest first: distances in its radius, and directions. */
const DIRECTIONS: Point[] = [[0, -1], [0, 1], [1, 0], [-1, 0], [0.8, -0.8], [-0.8, -0.8], [0.8, 0.8], [-0.8, 0.8]];
const OFFSETS = [1, 1.5, 2, 3, 4, 6, 8, 11, 15].flatMap((far) => DIRECTIONS.map(([x, y]): Point => [far * x, far * y]));

/**
 * Names of the islands, the largest first, each beside its island: they cover no cells, no other name, not the chosen
 * cell's ring, and are not cut. One that stands off has a line to its island, which crosses no name; one that fits nowhere
 * is left out. -> their boxes
 */
export function drawNames(
  context: Context, camera: Camera, islands: Island[], layers: Float32Array[], chosen: Point | null,
  ink: string, ground: string,
): Box[] {
  const { width, height, scale } = camera;
  const isSmall = Math.min(width, height) < 480;
  const size = isSmall ? 11 : 13; // pixels
  const font = `600 ${size}px system-ui, sans-serif`;
  Object.assign(context, { textAlign: "center", textBaseline: "middle", lineJoin: "round", font });
  const hasCells = islands.length ? cellsIn(camera, layers) : () => false;
  const names: Box[] = [];
  const marks = chosen ? [around(chosen, RING + 2)] : []; // the ring, and points of lines
  const isApart = (box: Box, others: Box[]) =>
    !others.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3]);
  for (const { name, x, y, radius } of islands) {
    const [middleX, middleY] = camera.toScreen([x, y]);
    if (middleX < 0 || middleX > width || middleY < 0 || middleY > height) continue;
    const lines = wrap(name, isSmall ? 16 : 22);
    const halfWidth = Math.max(...lines.map((text) => context.measureText(text).width)) / 2 + 3;
    const halfHeight = (lines.length * (size + 2)) / 2 + 1;
    const reach = Math.max(8, Math.min(radius, NEAR) * scale);
    const boxes = OFFSETS.map(([dx, dy]): Box => {
      const centreX = middleX + dx * reach + Math.sign(dx) * halfWidth;
      const centreY = middleY + dy * reach + Math.sign(dy) * halfHeight;
      return [centreX - halfWidth, centreY - halfHeight, centreX + halfWidth, centreY + halfHeight];
    });
    const lineOf = ([left, top, right, bottom]: Box): Point[] => {
      const [edgeX, edgeY] = [Math.min(right, Math.max(left, middleX)), Math.min(bottom, Math.max(top, middleY))];
      const gap = Math.hypot(edgeX - middleX, edgeY - middleY);
      const shares = gap > 1.8 * reach ? ticks(0, 1 - (0.8 * reach) / gap, 20) : [];
      return shares.map((share) => [edgeX + (middleX - edgeX) * share, edgeY + (middleY - edgeY) * share]);
    };
    const isFree = (box: Box) =>
      box[0] >= 0 && box[1] >= 0 && box[2] < width && box[3] < height && !hasCells(box) && isApart(box, names) &&
      isApart(box, marks) && lineOf(box).every((point) => isApart(around(point, 1), names));
    const box = boxes.find(isFree);
    if (!box) continue;
    names.push(box);
    const line = lineOf(box);
    drawLine(context, line, ink, 0.7, []);
    marks.push(...line.map((point) => around(point, 1)));
    const [left, top, right] = box;
    Object.assign(context, { lineWidth: 4, strokeStyle: ground, fillStyle: ink });
    lines.forEach((text, i) => {
      const lineY = top + 1 + (i + 0.5) * (size + 2);
      context.strokeText(text, (left + right) / 2, lineY);
      context.fillText(text, (left + right) / 2, lineY);
    });
  }
  return names;
}

const around = ([x, y]: Point, reach: number): Box => [x - reach, y - reach, x + reach, y + reach];

/** At most two lines of about `width` characters; what is longer ends with dots. */
function wrap(name: string, width: number): string[] {
  const space = name.lastIndexOf(" ", width) > 0 ? name.lastIndexOf(" ", width) : name.indexOf(" ");
  const lines = name.length > width && space > 0 ? [name.slice(0, space), name.slice(space + 1)] : [name];
  return lines.map((line) => (line.length > width + 6 ? `${line.slice(0, width + 5)}…` : line));
}
