// Express with ioredis and BullMQ:  NODE_ENV=production PORT=… REDIS_URL=… QUEUE=… node express.js
'use strict';

const express = require('express');
const { MAX_BODY_BYTES, PATH, intake } = require('./job');

const accept = intake(process.env);
const app = express();
app.disable('x-powered-by');
app.disable('etag');

app.post(PATH, express.json({ limit: MAX_BODY_BYTES }), async (request, response) => {
  const { status, body } = await accept(request.body);
  response.status(status).json(body);
});

app.listen(Number(process.env.PORT), '127.0.0.1');
