// Counts in a pair of words behind two marks, and checks a table of objects that it keeps replacing.
// usage: node busy.js MARK MARK. It prints "at N" now and then, or once "FAIL ...".
const fs = require('fs');

const words = new BigUint64Array(new SharedArrayBuffer(4096));
[words[0], words[1]] = process.argv.slice(2).map(BigInt);
const table = new Map();
const plugins = [];

function entry(key, turn) {
  return { key, turn, text: `${key}:${turn}`, list: Array.from({ length: 20 }, (_, i) => key * turn + i) };
}

function check(key, found) {
  const wanted = entry(key, found.turn);
  if (found.key !== key || found.text !== wanted.text || found.list.some((n, i) => n !== wanted.list[i])) {
    fs.writeSync(1, `FAIL entry ${key}: ${JSON.stringify(found)}\n`);
    process.exit(1);
  }
}

let count = 0n;

function work() {
  const end = Date.now() + 20;
  while (Date.now() < end) {
    count++;
    Atomics.store(words, 2, count);
    Atomics.store(words, 3, count);
    const key = Number(count * 40503n % 5003n);
    if (table.has(key)) check(key, table.get(key));
    table.set(key, entry(key, Number(count % 1000003n)));
  }
  // Each of these reserves some GiB of address space and uses a few pages of it.
  if (plugins.length < 8) plugins.push(new WebAssembly.Memory({ initial: 16, maximum: 65536 }));
  fs.writeSync(1, `at ${count}\n`);
  setImmediate(work);
}

work();
