// What is drawn over the cells: names of islands, lines, rings. Points are pixels of the screen.

import type { Camera, Point } from "./camera";
import type { Island } from "./islands";

type Context = CanvasRenderingContext2D;

export function drawLine(context: Context, points: Point[], colour: string, width: number, dashes: number[]): void {
  context.beginPath();
  for (const point of points) context.lineTo(...point);
  context.lineWidth = width;
  context.strokeStyle = colour;
  context.setLineDash(dashes);
  context.stroke();
  context.setLineDash([]);
}

export function drawRing(context: Context, point: Point, radius: number, colour: string, width: number): void {
  context.beginPath();
  context.arc(...point, radius, 0, 2 * Math.PI);
  context.lineWidth = width;
  context.strokeStyle = colour;
  context.stroke();
}

/** Names of the islands, the largest first; one that would cover another is left out. */
export function drawNames(
  context: Context, camera: Camera, islands: Island[], nameOf: (node: number) => string, ink: string, ground: string,
): void {
  const { width, height, scale } = camera;
  const isSmall = Math.min(width, height) < 480;
  const size = isSmall ? 11 : 13; // pixels
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.lineJoin = "round";
  context.lineWidth = 4;
  context.strokeStyle = ground;
  context.fillStyle = ink;
  context.font = `600 ${size}px system-ui, sans-serif`;
  const taken: number[][] = [];
  for (const { node, x, y, radius } of islands) {
    const lines = wrap(nameOf(node), isSmall ? 16 : 22);
    const [middle, centre] = camera.toScreen([x, y]);
    const reach = radius * scale;
    const line = reach > 24 ? centre : centre - reach * 1.5 - 6 - (lines.length * size) / 2; // it would hide a small one
    const halfWidth = Math.max(...lines.map((text) => context.measureText(text).width)) / 2 + 3;
    const halfHeight = (lines.length * (size + 2)) / 2 + 1;
    const box = [middle - halfWidth, line - halfHeight, middle + halfWidth, line + halfHeight];
    const meets = (other: number[]) =>
      box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3];
    if (!meets([0, 0, width, height]) || taken.some(meets)) continue;
    taken.push(box);
    lines.forEach((text, i) => {
      const lineY = line + (i - (lines.length - 1) / 2) * (size + 2);
      context.strokeText(text, middle, lineY);
      context.fillText(text, middle, lineY);
    });
  }
}

/** At most two lines of about `width` characters; what is longer ends with dots. */
function wrap(name: string, width: number): string[] {
  const space = name.lastIndexOf(" ", width) > 0 ? name.lastIndexOf(" ", width) : name.indexOf(" ");
  const lines = name.length > width && space > 0 ? [name.slice(0, space), name.slice(space + 1)] : [name];
  return lines.map((line) => (line.length > width + 6 ? `${line.slice(0, width + 5)}…` : line));
}
