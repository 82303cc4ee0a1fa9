// A real BullMQ worker that finishes every job and writes a line of JSON for each call of its processor.
//
//     node worker.js bullmq5|bullmq6 PORT PREFIX QUEUE CONCURRENCY
//
// SIGTERM ends it when its jobs are finished. An error is written as a line that is not JSON.
'use strict';

const { createHash } = require('node:crypto');
const { Redis } = require('ioredis');

const [line, port, prefix, queue, concurrency] = process.argv.slice(2);
const { Worker } = require(line);

const address = { host: '127.0.0.1', port: Number(port), maxRetriesPerRequest: null };
const client = new Redis(address);

/** Return the digest of the bytes in Redis: parsing hides how they are spelled. */
async function digest(id) {
  const data = await client.hgetBuffer(`${prefix}:${queue}:${id}`, 'data');
  return createHash('sha256').update(data).digest('hex');
}

async function processJob(job) {
  if (job.data.event !== job.name) {
    throw new Error(`${job.id} is named ${job.name}`);
  }
  process.stdout.write(`${JSON.stringify({ id: job.id, name: job.name, sha256: await digest(job.id) })}\n`);
  return 'done';
}

async function main() {
  const worker = new Worker(queue, processJob, { connection: address, prefix, concurrency: Number(concurrency) });
  for (const event of ['error', 'stalled']) {
    worker.on(event, (what) => console.error(event, what));
  }
  worker.on('failed', (job, error) => console.error('failed', error));
  process.on('SIGTERM', async () => {
    await worker.close();
    process.exit(0);
  });
  await worker.waitUntilReady();
  console.log('ready');
}

main();
