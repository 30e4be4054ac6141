// Where the name of a group of cells stands on a map: where most of them lie.

export interface Island {
  node: number;
  count: number;
  x: number;
  y: number;
  radius: number; // half of its cells are nearer
}

/** One place per group of at least `least` cells: layout (n, 2), groups (n,); group 0 has no name. */
export function islands(layout: Float32Array, groups: ArrayLike<number>, least: number): Island[] {
  const members = new Map<number, number[]>();
  for (let i = 0; i < groups.length; i++) {
    if (!groups[i]) continue;
    const own = members.get(groups[i]);
    if (own) own.push(i);
    else members.set(groups[i], [i]);
  }
  const found: Island[] = [];
  for (const [node, own] of members) {
    if (own.length < least) continue;
    found.push({ node, count: own.length, ...densest(layout, own) });
  }
  return found.sort((a, b) => b.count - a.count);
}

/** The fullest cell of a coarse grid, then twice the mean of the group's cells around. */
function densest(layout: Float32Array, own: number[]): { x: number; y: number; radius: number } {
  const cells = new Map<number, number>();
  const side = 0.12;
  let best = 0, place = 0;
  for (const i of own) {
    const key = Math.floor((layout[2 * i] + 2) / side) * 64 + Math.floor((layout[2 * i + 1] + 2) / side);
    const count = (cells.get(key) ?? 0) + 1;
    cells.set(key, count);
    if (count > best) [best, place] = [count, key];
  }
  let x = (Math.floor(place / 64) + 0.5) * side - 2;
  let y = ((place % 64) + 0.5) * side - 2;
  for (let step = 0; step < 3; step++) {
    let sumX = 0, sumY = 0, near = 0;
    for (const i of own) {
      const [dx, dy] = [layout[2 * i] - x, layout[2 * i + 1] - y];
      if (dx * dx + dy * dy > 0.03) continue;
      sumX += layout[2 * i];
      sumY += layout[2 * i + 1];
      near++;
    }
    if (near) [x, y] = [sumX / near, sumY / near];
  }
  const distances = own.map((i) => Math.hypot(layout[2 * i] - x, layout[2 * i + 1] - y)).sort((a, b) => a - b);
  return { x, y, radius: distances[distances.length >> 1] };
}
