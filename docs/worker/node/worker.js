// A worker for the jobs of webhookd: acts on each message of a customer, and on nothing else.
//
//     REDIS_URL=redis://127.0.0.1:6379/0 node worker.js
//
// WEBHOOK_QUEUE and WEBHOOK_PREFIX are those of webhookd. SIGTERM or Ctrl-C ends it once its jobs are finished.
import { Worker } from 'bullmq';
import { Redis } from 'ioredis';

const { REDIS_URL = 'redis://127.0.0.1:6379/0', WEBHOOK_QUEUE = 'chatwoot', WEBHOOK_PREFIX = 'bull' } = process.env;
const REMEMBERED_FOR_S = 7 * 24 * 3600; // longer than Chatwoot, webhookd or a person may repeat an event

// BullMQ wants null: a worker that waits for jobs must not give up while Redis restarts.
const redis = new Redis(REDIS_URL, { maxRetriesPerRequest: null });

/** What this worker is for: put your own work here. It may throw: BullMQ tries the job again. */
async function handle(message) {
  console.log(`message ${message.id} in conversation ${message.conversation.id}: here is your work`);
}

/** The event of a job, with either --job-data of webhookd. */
function eventOf(job) {
  const isEnvelope = 'payload' in job.data && 'deliveryId' in job.data;
  return isEnvelope ? job.data.payload : job.data;
}

/**
 * Whether a customer wrote it. Chatwoot tells of our own answers, too: they are `outgoing`, be they an agent's, a
 * bot's or sent by its API. A worker that answers those answers itself, forever. Notes among agents are `private`.
 */
function isFromCustomer(event) {
  return event.event === 'message_created' && event.message_type === 'incoming' && !event.private;
}

/**
 * Does the work, unless it was done. The mark comes after the work: a crash in between does it twice, where a mark
 * before it would lose a message. With a database, write the mark in the transaction of the work: then it is once.
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
worker.on('error', (error) => console.error(error.message)); // Redis is away: it connects again by itself

async function end() {
  await worker.close(); // takes no further job, and finishes those under way
  await redis.quit();
}
process.once('SIGTERM', end);
process.once('SIGINT', end);
