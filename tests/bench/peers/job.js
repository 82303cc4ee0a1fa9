// Shared by both peers: the lock, the job, and the options of a typical user.
'use strict';

const { Queue } = require('bullmq');
const { Redis } = require('ioredis');

const LOCK_TTL_MS = 5000;

// webhookd's own defaults, so that all servers write jobs of the same size.
const OPTIONS = {
  attempts: 3,
  backoff: { type: 'exponential', delay: 1000 },
  removeOnComplete: { age: 3600, count: 1000 },
  removeOnFail: { age: 604800 },
};

/** Returns a function that queues one event, once, and resolves to the status and the body of the answer. */
function intake({ REDIS_URL, QUEUE }) {
  const redis = new Redis(REDIS_URL, { maxRetriesPerRequest: null });
  const queue = new Queue(QUEUE, { connection: redis });

  return async function accept(event) {
    const jobId = `${event.inbox.id}-${event.id}`;
    const lock = await redis.set(`${QUEUE}:create-lock:${jobId}`, '1', 'PX', LOCK_TTL_MS, 'NX');
    if (lock === null) {
      return { status: 200, body: { status: 'already_queued', jobId } };
    }
    await queue.add(event.event, event, { ...OPTIONS, jobId });
    return { status: 202, body: { status: 'queued', jobId } };
  };
}

module.exports = { PATH: '/webhook/chatwoot', MAX_BODY_BYTES: 16 * 1024 * 1024, intake };
