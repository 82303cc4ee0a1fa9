// Bull Board for webhookd's queues. It shows the content of jobs, so restrict who can reach it.
//
// HOST, PORT           address and port; 127.0.0.1, 3003
// REDIS_URL            redis://127.0.0.1:6379/0
// QUEUES, PREFIX       BullMQ's queue names, separated by spaces, and prefix; chatwoot, bull
// LOGIN                required "user:password"; without it there is no login
// MAY_CHANGE           "yes" allows to retry, remove and pause; otherwise it only reads
'use strict';

const { createHash, timingSafeEqual } = require('node:crypto');
const { createBullBoard } = require('@bull-board/api');
const { BullMQAdapter } = require('@bull-board/api/bullMQAdapter');
const { ExpressAdapter } = require('@bull-board/express');
const { Queue } = require('bullmq');
const express = require('express');
const { Redis } = require('ioredis');

// Without this policy its pages would load fonts from Google, which would see who looks at what.
const POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:";

// Compose passes an empty value if a variable is not set.
const setting = (name, otherwise) => process.env[name] || otherwise;

const host = setting('HOST', '127.0.0.1');
const port = Number(setting('PORT', 3003));
const prefix = setting('PREFIX', 'bull');
const login = setting('LOGIN', '');
const readOnlyMode = setting('MAY_CHANGE', '') !== 'yes';

const connection = new Redis(setting('REDIS_URL', 'redis://127.0.0.1:6379/0'));
connection.on('error', (error) => console.error(`Redis: ${error.message}`));

/** With a queue that BullMQ 5 has paused, BullMQ 6 loses nothing, but does not show the jobs in its paused list. */
function board(name) {
  // Otherwise a Queue writes its version into the queue's meta, and webhookd (--wire auto) would assume that the
  // workers run BullMQ 6.
  const queue = new Queue(name, { connection, prefix, skipMetasUpdate: true });
  queue.on('error', (error) => console.error(`${name}: ${error.message}`));
  return new BullMQAdapter(queue, { readOnlyMode });
}

const digest = (text) => createHash('sha256').update(text).digest();

function authenticate(expected) {
  const wanted = digest(`Basic ${Buffer.from(expected).toString('base64')}`);
  return (request, response, next) => {
    if (timingSafeEqual(digest(request.headers.authorization ?? ''), wanted)) {
      next();
    } else {
      response.set('WWW-Authenticate', 'Basic realm="Bull Board", charset="UTF-8"').sendStatus(401);
    }
  };
}

const pages = new ExpressAdapter();
createBullBoard({ queues: setting('QUEUES', 'chatwoot').split(/\s+/).map(board), serverAdapter: pages });

const app = express();
app.use((_request, response, next) => {
  response.set('Content-Security-Policy', POLICY);
  next();
});
if (login) {
  app.use(authenticate(login));
}
app.use(pages.getRouter());
app.listen(port, host, (error) => {
  if (error) {
    console.error(error.message);
    process.exit(1);
  }
  console.log(`Bull Board on http://${host}:${port}`);
});

// In a container it is process 1, which has no default action for signals.
process.on('SIGTERM', () => process.exit(0));
