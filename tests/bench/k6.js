// An open loop of webhooks, each with a new id:
//
//   k6 run -e URL=… -e BODY=FILE -e FIRST_ID=… -e RATE=… -e DURATION_S=… k6.js
//
// RATE requests start each second, however long the answers take. In the body, @ID@ stands for 16 digits.

import { scenario } from 'k6/execution';
import http from 'k6/http';
import { Counter } from 'k6/metrics';

const rate = Number(__ENV.RATE);
const firstId = Number(__ENV.FIRST_ID);
const [head, tail] = open(__ENV.BODY).split('@ID@');
const parameters = { headers: { 'Content-Type': 'application/json' } };

export const options = {
  discardResponseBodies: true,
  summaryTrendStats: ['med', 'p(95)', 'p(99)', 'max'],
  scenarios: {
    webhooks: {
      executor: 'constant-arrival-rate',
      rate,
      timeUnit: '1s',
      duration: `${__ENV.DURATION_S}s`,
      // Enough for answers of half a second at 1,000 requests/s: k6 drops a request if it has no free user.
      preAllocatedVUs: 500,
      maxVUs: 4 * rate,
    },
  },
};

const answered2xx = new Counter('answered_2xx');

export default function () {
  const body = head + String(firstId + scenario.iterationInTest) + tail;
  const { status } = http.post(__ENV.URL, body, parameters);
  if (status >= 200 && status < 300) {
    answered2xx.add(1);
  }
}

export function handleSummary({ metrics }) {
  return { stdout: JSON.stringify(metrics) };
}
