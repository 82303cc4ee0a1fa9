// A real BullMQ worker with bullmq-otel: it finishes every job, and writes each of its spans as a line of JSON.
//
//     node traced_worker.js PORT PREFIX QUEUE
//
// SIGTERM ends it when its jobs are finished. An error is written as a line that is not JSON.
'use strict';

const { NodeTracerProvider } = require('@opentelemetry/sdk-trace-node');
const { SimpleSpanProcessor } = require('@opentelemetry/sdk-trace-base');
const { BullMQOtel } = require('bullmq-otel');
const { Worker } = require('bullmq6');

const [port, prefix, queue] = process.argv.slice(2);

/** An exporter to standard output, for the test to read. */
const lines = {
  export(spans, done) {
    for (const span of spans) {
      const { traceId, spanId } = span.spanContext();
      const parentId = span.parentSpanContext?.spanId;
      process.stdout.write(`${JSON.stringify({ name: span.name, traceId, spanId, parentId })}\n`);
    }
    done({ code: 0 });
  },
  async shutdown() {},
};

async function main() {
  new NodeTracerProvider({ spanProcessors: [new SimpleSpanProcessor(lines)] }).register();
  const worker = new Worker(queue, async () => 'done', {
    connection: { host: '127.0.0.1', port: Number(port), maxRetriesPerRequest: null },
    prefix,
    telemetry: new BullMQOtel({ tracerName: 'worker' }),
  });
  for (const event of ['error', 'stalled', 'failed']) {
    worker.on(event, (...what) => console.error(event, ...what));
  }
  process.on('SIGTERM', async () => {
    await worker.close();
    process.exit(0);
  });
  await worker.waitUntilReady();
  console.log('ready');
}

main();
