// Fastify with ioredis and BullMQ:  NODE_ENV=production PORT=… REDIS_URL=… QUEUE=… node fastify.js
'use strict';

const fastify = require('fastify');
const { MAX_BODY_BYTES, PATH, intake } = require('./job');

const accept = intake(process.env);
const app = fastify({ bodyLimit: MAX_BODY_BYTES });

app.post(PATH, async (request, reply) => {
  const { status, body } = await accept(request.body);
  reply.code(status);
  return body;
});

app.listen({ port: Number(process.env.PORT), host: '127.0.0.1' });
