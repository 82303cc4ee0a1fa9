// Actions of an operator on a queue, with BullMQ itself.
//
//     NODE_PATH=… node queue.js bullmq5|bullmq6 PORT PREFIX QUEUE pause|resume|obliterate
'use strict';

const [line, port, prefix, name, action] = process.argv.slice(2);
const { Queue } = require(line);

async function main() {
  const queue = new Queue(name, { connection: { host: '127.0.0.1', port: Number(port) }, prefix });
  await queue[action](...(action === 'obliterate' ? [{ force: true }] : []));
  await queue.close();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
