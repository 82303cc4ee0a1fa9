-- A closed loop of webhooks, each with a new id:
--
--   wrk -s wrk.lua URL -- REQUEST FIRST_ID REPEAT [SIGNATURES]
--
-- REQUEST is a file with one whole HTTP request; in it, @ID@ stands for 16 digits and @SIGNATURE@ for 64. The
-- ids count up from FIRST_ID, and each is sent REPEAT times. SIGNATURES is a file with the signatures of the
-- bodies, 64 digits each, in that order; without it, all are zeros.
--
-- It does not use `wrk.format` or a `response` function: they would cost more than the request itself.

local head, middle, tail
local first_id, times, signatures
local sent = -1 -- wrk asks for one request that it never sends

local function read(path)
  local file = assert(io.open(path, 'rb'))
  local content = file:read('*a')
  file:close()
  return content
end

local function split(text, mark)
  local from, to = text:find(mark, 1, true)
  return text:sub(1, from - 1), text:sub(to + 1)
end

function init(arguments)
  local rest
  head, rest = split(read(arguments[1]), '@SIGNATURE@')
  middle, tail = split(rest, '@ID@')
  first_id, times = tonumber(arguments[2]), tonumber(arguments[3])
  signatures = arguments[4] and read(arguments[4])
end

local NO_SIGNATURE = ('0'):rep(64)

local function signature(n)
  return signatures and signatures:sub(64 * n + 1, 64 * n + 64) or NO_SIGNATURE
end

function request()
  local n = math.floor(sent / times)
  sent = sent + 1
  return head .. signature(n) .. middle .. ('%.0f'):format(first_id + n) .. tail
end

function done(summary, latency)
  local errors = summary.errors
  io.write(('BENCH {"requests":%d,"bad_status":%d,"socket_errors":%d,"timeouts":%d,"duration_us":%d,'
    .. '"p50_us":%d,"p95_us":%d,"p99_us":%d,"max_us":%d}\n'):format(
    summary.requests, errors.status, errors.connect + errors.read + errors.write, errors.timeout,
    summary.duration, latency:percentile(50), latency:percentile(95), latency:percentile(99), latency.max))
end
