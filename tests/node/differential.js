// Runs operations of the real BullMQ for tests/integration/test_differential.py.
//
//     node differential.js bullmq5|bullmq6
//
// Each line of standard input is a request {port, db, operations}, and each line of standard output its answer:
// a list with the result of each operation, or {error}. An operation is {name, now_ms, ...}. Date.now() returns
// `now_ms` during the operation, so that two runs of a list write the same times.
'use strict';

const readline = require('node:readline');
const { Redis } = require('ioredis');
const bullmq = require(process.argv[2]);

const QUEUE = 'q';
const TOKEN = 'token';

Math.random = () => 0.5; // the jitter of a backoff

/** One database of one server, with a queue, and a worker that takes and finishes jobs one by one. */
class World {
  constructor(port, db) {
    this.client = new Redis({ port, db, maxRetriesPerRequest: null });
    this.queue = new bullmq.Queue(QUEUE, { connection: this.client, skipMetasUpdate: true });
    this.worker = new bullmq.Worker(QUEUE, null, { connection: this.client, autorun: false, name: 'worker' });
    this.taken = [];
  }

  /** Prepare the queue. With `writes_meta`, do what the constructor of a Queue does. */
  async open({ writes_meta, defaults }) {
    await this.queue.waitUntilReady();
    await this.worker.waitUntilReady();
    this.taken = [];
    this.queue.jobsOpts = defaults;
    if (writes_meta) {
      await this.client.hset(this.queue.keys.meta, this.queue.metaValues);
    }
  }

  async add({ jobs: [{ name, data, options }] }) {
    await this.queue.add(name, parsed(data), options);
  }

  async addBulk({ jobs }) {
    await this.queue.addBulk(jobs.map(({ name, data, options }) => ({ name, data: parsed(data), opts: options })));
  }

  async pause() {
    await this.queue.pause();
  }

  async resume() {
    await this.queue.resume();
  }

  async setConcurrency({ concurrency }) {
    await this.queue.setGlobalConcurrency(concurrency);
  }

  async setMaxEvents({ max_events }) {
    await this.client.hset(this.queue.keys.meta, 'opts.maxLenEvents', max_events);
  }

  async remove({ id }) {
    return this.queue.remove(id);
  }

  async promote({ id }) {
    const job = await this.queue.getJob(id);
    await job?.promote();
  }

  async take() {
    const job = await this.worker.getNextJob(TOKEN, { block: false });
    if (!job) {
      return null;
    }
    this.taken.push(job);
    return job.asJSON();
  }

  async complete() {
    await this.taken.shift()?.moveToCompleted('done', TOKEN, false);
  }

  async fail() {
    const error = new Error('failed');
    error.stack = 'failed';
    await this.taken.shift()?.moveToFailed(error, TOKEN, false);
  }

  /** Return the results of the getters. */
  async look({ ids }) {
    const [counts, waiting, ...jobs] = await Promise.all([
      this.queue.getJobCounts(),
      this.queue.getWaiting(),
      ...ids.map((id) => this.queue.getJob(id)),
    ]);
    const states = await Promise.all(ids.map((id) => this.queue.getJobState(id)));
    return { counts, waiting: waiting.map((job) => job.id), jobs: jobs.map((job) => job?.toJSON() ?? null), states };
  }
}

/** Return the value of a JSON text, which JSON.stringify must write in the same way. */
function parsed(text) {
  const value = JSON.parse(text);
  if (JSON.stringify(value) !== text) {
    throw new Error(`JSON.stringify writes this data in another way: ${text}`);
  }
  return value;
}

const worlds = new Map();

function worldAt(port, db) {
  const address = `${port}/${db}`;
  if (!worlds.has(address)) {
    worlds.set(address, new World(port, db));
  }
  return worlds.get(address);
}

async function run({ port, db, operations }) {
  const world = worldAt(port, db);
  const results = [];
  for (const { name, now_ms, ...details } of operations) {
    Date.now = () => now_ms;
    results.push((await world[name](details).catch((error) => ({ refused: error.message }))) ?? null);
  }
  return results;
}

async function main() {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const answer = await run(JSON.parse(line)).catch((error) => ({ error: error.stack }));
    process.stdout.write(`${JSON.stringify(answer)}\n`);
  }
  process.exit(0);
}

main();
