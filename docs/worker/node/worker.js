// A worker for webhookd's jobs. It processes each message from a customer, and ignores everything else.
//
//     REDIS_URL=redis://127.0.0.1:6379/0 node worker.js
//
// WEBHOOK_QUEUE and WEBHOOK_PREFIX are those of webhookd. On SIGTERM or Ctrl-C it finishes its jobs, and exits.
import { Worker } from 'bullmq';
import { Redis } from 'ioredis';

const { REDIS_URL = 'redis://127.0.0.1:6379/0', WEBHOOK_QUEUE = 'chatwoot', WEBHOOK_PREFIX = 'bull' } = process.env;
const REMEMBERED_FOR_S = 7 * 24 * 3600; // longer than Chatwoot, webhookd or a person may repeat an event

// BullMQ wants null: a worker that waits for jobs must not give up while Redis restarts.
const redis = new Redis(REDIS_URL, { maxRetriesPerRequest: null });

/** Put your own work here. It may throw: BullMQ retries the job. */
async function handle(message) {
  console.log(`message ${message.id} in conversation ${message.conversation.id}: here is your work`);
}

/** Returns the event of a job, for either --job-data of webhookd. */
function eventOf(job) {
  const isEnvelope = 'payload' in job.data && 'deliveryId' in job.data;
  return isEnvelope ? job.data.payload : job.data;
}

/**
 * Returns true if a customer wrote the message. Chatwoot also sends an event for each answer of an agent, a bot or its
 * API: these are `outgoing`. A worker that answers them answers itself, forever. Notes between agents are `private`.
 */
function isFromCustomer(event) {
  return event.event === 'message_created' && event.message_type === 'incoming' && !event.private;
}

/**
 * Does the work, unless it was done before. The mark is written after the work: a crash in between repeats the work. If
 * the mark came first, the crash would lose a message. With a database, write both in one transaction: then it is once.
 */
async function once(jobId, work) {
  const mark = `done:${jobId}`;
  if (await redis.exists(mark)) {
    return 'was done before';
  }
  await work();
  await redis.set(mark, '1', 'EX', REMEMBERED_FOR_S);
  return 'done';
}

async function processJob(job) {
  const event = eventOf(job);
  return isFromCustomer(event) ? once(job.id, () => handle(event)) : 'ignored';
}

const worker = new Worker(WEBHOOK_QUEUE, processJob, { connection: redis, prefix: WEBHOOK_PREFIX, concurrency: 8 });
worker.on('ready', () => console.log(`waiting for jobs of the queue ${WEBHOOK_QUEUE}`));
worker.on('completed', (job, result) => console.log(`${job.id}: ${result}`));
worker.on('failed', (job, error) => console.error(`${job?.id}: ${error.message}`));
worker.on('error', (error) => console.error(error.message)); // Redis is down: the worker reconnects by itself

async function end() {
  await worker.close(); // takes no further jobs, and finishes those in progress
  await redis.quit();
}
process.once('SIGTERM', end);
process.once('SIGINT', end);
