// The map as a PNG, with a legend of the level or column that colours it.

import { download, fileName } from "./download";
import { find } from "./format";
import type { Page } from "./page";

const LINE = 18; // pixels a row of the legend
const SIDE = 230; // pixels across the legend

export function savePicture(page: Page): void {
  const { title } = page.about;
  const { ratio } = page.map;
  const layers = [find<HTMLCanvasElement>("#points"), find<HTMLCanvasElement>("#overlay")];
  page.map.drawNow(); // what WebGL has drawn can be read in the same step only
  const [map] = layers;
  const rows = legendOf(page);
  const picture = document.createElement("canvas");
  picture.width = map.width + (rows.length ? SIDE * ratio : 0);
  picture.height = Math.max(map.height, (rows.length + 2) * LINE * ratio);
  const context = picture.getContext("2d")!;
  const { color: ink, backgroundColor: ground } = getComputedStyle(document.body);
  context.fillStyle = ground;
  context.fillRect(0, 0, picture.width, picture.height);
  for (const layer of layers) context.drawImage(layer, 0, 0);
  context.scale(ratio, ratio);
  context.textBaseline = "middle";
  context.font = "12px system-ui, sans-serif";
  context.fillStyle = ink;
  const left = map.width / ratio;
  context.fillText(`${title}, ${page.prefixName()}`, 12, map.height / ratio - 14);
  rows.forEach(([name, colour], i) => {
    const y = (i + 1) * LINE;
    context.fillStyle = colour;
    context.fillRect(left, y - 5, 10, 10);
    context.fillStyle = ink;
    context.fillText(name.length > 34 ? `${name.slice(0, 33)}…` : name, left + 16, y);
  });
  picture.toBlob((blob) => {
    if (blob) download(fileName(title, `prefix_${page.stop}.png`), blob);
  });
}

function legendOf(page: Page): [string, string][] {
  const { column, level, tree, counts } = page;
  if (column) {
    const values = (column.values ?? []).slice(0, 40);
    return values.map((name, i) => [name, page.colourOf(column, i + 1)]);
  }
  const shown = [...tree.nodes.keys()].filter((node) => tree.depth(node) === level && counts[node]).slice(0, 60);
  return shown.map((node) => [page.label(node), tree.nodes[node].colour]);
}
