--[[
  Adds a batch of jobs to one BullMQ queue, each job id once, and leaves what Queue.add()
  of BullMQ 5 or 6 would have left, and a creation lock for each new job.

  A job whose lock or hash exists is a duplicate. It has the effects that BullMQ gives to
  an add with a known job id, and no others: its lock is not extended.

    KEYS[1..10]  wait, paused, meta, id, delayed, active, prioritized, pc, events, marker
    KEYS[11..]   for each job: its hash, its lock

    ARGV[1]      what the locks hold
    ARGV[2]      how long they live, in ms
    ARGV[3]      whose workers the queue has: "5", "6", or "auto" to go by meta.version
    ARGV[4..]    for each job: id, name, data (JSON), options (JSON), timestamp (ms),
                 delay (ms), priority, lifo ("1" or "0")

  Returns an array with an answer to each job, in order:

    1     added
    2     duplicate: its lock is held
    3     duplicate: its hash exists
    text  refused, with the error; nothing of the job is left, or if undoing failed too,
          the whole job without its lock, so that the same add again is a duplicate

  or an error for the whole call, and then no job was added: a key of the queue has another
  type (WRONGTYPE), Redis takes no writes (OOM, READONLY, MISCONF, ...), or each job failed
  (NOPERM). In either place, an error's first word is its code.

  Redis does not roll a script back. So types are checked before the first write, all that
  an add has written can be taken back, and the lock, which says "seen", comes last.

  An ACL must allow EVAL, EVALSHA, TYPE, EXISTS, HMGET, LLEN, INCRBY, INCR, HSET, HMSET, DEL,
  XADD, XDEL, LPUSH, RPUSH, LREM, ZADD, ZREM, ZRANGE, ZREVRANGEBYSCORE and SET.

  Numbers are sent as text: some servers write a number like 300000000 as "3e+8".
]]

local unpack = table.unpack or unpack

local wait, paused, meta, id, delayed, active, prioritized, pc, events, marker = unpack(KEYS, 1, 10)
local TYPES = { 'list', 'list', 'hash', 'string', 'zset', 'list', 'zset', 'string', 'stream', 'zset' }
local lock_value, lock_ttl, wire = unpack(ARGV, 1, 3)
local jobs_count = (#KEYS - 10) / 2

local ADDED, LOCK_HELD, JOB_EXISTS = 1, 2, 3

-- Redis 6.2 puts "@user_script: 12: -" before an error's code, and no server gives a code
-- to what its ACL denies to a script.
local function with_code(message)
  message = message:gsub('^@user_script: %d+: ', ''):gsub('^%-', ''):gsub('%s+$', '')
  if message:find('user executing the script', 1, true) or message:find('ACL failure', 1, true) then
    message = 'NOPERM ' .. message:gsub('^ERR ', '')
  end
  return message
end

-- Runs a command; raises a plain string if it fails.
local function call(...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then
    error(with_code(reply.err), 0)
  end
  return reply
end

local function wrong_type(key, found, expected)
  return 'WRONGTYPE ' .. key .. ' is a ' .. found .. ', not a ' .. expected
end

-- Exact for every double.
local function text(number)
  return string.format('%.17g', number)
end

-- The state of the queue, read once for all jobs: call look_at_queue() first.
local exists = {}
local max_events, is_paused, target, needs_marker

-- BullMQ 5 keeps the jobs of a paused queue in `paused`, BullMQ 6 in `wait`, and resume() of
-- BullMQ 5 renames `paused` over `wait`: jobs in both lists are jobs lost. So a list that is
-- there gets the job, and the version counts only if neither is. In doubt it is `paused`,
-- which both versions resume.
local function target_of_paused(version)
  if exists[paused] then return paused end
  if exists[wait] then return wait end
  local major = tonumber(wire) or tonumber(string.match(version or '', '^bullmq:(%d+)')) or 5
  return major >= 6 and wait or paused
end

local function look_at_queue()
  for i, expected in ipairs(TYPES) do
    local found = call('TYPE', KEYS[i]).ok
    if found ~= 'none' and found ~= expected then
      error(wrong_type(KEYS[i], found, expected), 0)
    end
    exists[KEYS[i]] = found ~= 'none'
  end

  local concurrency, version
  max_events, is_paused, concurrency, version =
    unpack(call('HMGET', meta, 'opts.maxLenEvents', 'paused', 'concurrency', 'version'), 1, 4)
  target = is_paused and target_of_paused(version) or wait
  needs_marker = not is_paused
    and not (concurrency and call('LLEN', active) >= tonumber(concurrency))
end

-- The inverse of each write of the job at hand, so that a later error leaves nothing of it.
local inverses = {}

local function undo_with(...)
  inverses[#inverses + 1] = { ... }
end

-- The list entry goes before the hash. If it cannot go, the job stays whole: a hash that
-- no list holds would answer "duplicate" for a job that no worker ever gets.
local function undo()
  for i = #inverses, 1, -1 do
    local reply = redis.pcall(unpack(inverses[i]))
    local failed = type(reply) == 'table' and reply.err
    if failed and inverses[i][1] ~= 'XDEL' then return end
  end
end

local function emit(...)
  undo_with('XDEL', events, call('XADD', events, ...))
end

-- BullMQ trims the stream at every event but `added`.
local function emit_and_trim(...)
  emit('MAXLEN', '~', max_events, '*', 'event', ...)
end

-- One marker wakes the workers for the whole batch. It may outlive a job that is undone: a
-- worker then looks, finds nothing, and waits again.
local function wake_workers()
  if needs_marker then
    call('ZADD', marker, '0', '0')
    needs_marker = false
  end
end

local function push(job)
  if job.is_lifo then
    call('RPUSH', target, job.id)
    undo_with('LREM', target, '-1', job.id)
  else
    call('LPUSH', target, job.id)
    undo_with('LREM', target, '1', job.id)
  end
  wake_workers()
  emit_and_trim('waiting', 'jobId', job.id)
end

-- By priority, then in order of arrival.
local function push_prioritized(job)
  local score = job.priority * 2 ^ 32 + call('INCR', pc) % 2 ^ 32
  call('ZADD', prioritized, text(score), job.id)
  undo_with('ZREM', prioritized, job.id)
  wake_workers()
  emit_and_trim('waiting', 'jobId', job.id)
end

-- By due time, then in order of arrival: each millisecond has 4096 scores.
local function delayed_score(due)
  local first, last = due * 4096, (due + 1) * 4096 - 1
  local newest = call('ZREVRANGEBYSCORE', delayed, text(last), text(first), 'WITHSCORES', 'LIMIT', '0', '1')
  if #newest == 0 then return first end
  return math.min(tonumber(newest[2]) + 1, last)
end

local function push_delayed(job)
  local due = tonumber(job.timestamp) + job.delay
  call('ZADD', delayed, text(delayed_score(due)), job.id)
  undo_with('ZREM', delayed, job.id)
  emit_and_trim('delayed', 'jobId', job.id, 'delay', text(due))
  -- The workers read from this marker when the next job is due; a paused queue has it too.
  local next_job = call('ZRANGE', delayed, '0', '0', 'WITHSCORES')
  call('ZADD', marker, text(tonumber(next_job[2]) / 4096), '1')
end

-- A user who may not undo must not begin. DEL of a job that is not there yet shows it.
local may_undo = false

local function rehearse_undo(job)
  if not may_undo then
    call('DEL', job.key)
    may_undo = true
  end
end

local function add(job)
  rehearse_undo(job)
  call('HMSET', job.key, 'name', job.name, 'data', job.data, 'opts', job.options,
    'timestamp', job.timestamp, 'delay', text(job.delay), 'priority', text(job.priority))
  undo_with('DEL', job.key)
  emit('*', 'event', 'added', 'jobId', job.id, 'name', job.name)
  if job.delay > 0 then
    push_delayed(job)
  elseif job.priority > 0 then
    push_prioritized(job)
  else
    push(job)
  end
  call('SET', job.lock, lock_value, 'PX', lock_ttl)
end

local function add_once(job)
  if call('EXISTS', job.lock) == 1 then
    emit_and_trim('duplicated', 'jobId', job.id)
    return LOCK_HELD
  end
  local found = call('TYPE', job.key).ok
  if found == 'hash' then
    emit_and_trim('duplicated', 'jobId', job.id)
    return JOB_EXISTS
  elseif found ~= 'none' then
    return wrong_type(job.key, found, 'hash')
  end
  add(job)
  return ADDED
end

local function job_at(i)
  local key, lock = unpack(KEYS, 9 + 2 * i, 10 + 2 * i)
  local job_id, name, data, options, timestamp, delay, priority, lifo = unpack(ARGV, 8 * i - 4, 8 * i + 3)
  return {
    key = key, lock = lock, id = job_id, name = name, data = data, options = options, timestamp = timestamp,
    delay = tonumber(delay), priority = tonumber(priority), is_lifo = lifo == '1',
  }
end

local function add_jobs()
  look_at_queue()
  -- If Redis lacks memory, a disk or replicas, it refuses only a script's first write: this
  -- one, whose failure harms nothing. BullMQ counts every add, whether it succeeds or not.
  call('INCRBY', id, text(jobs_count))
  if not max_events then
    max_events = '10000'
    call('HSET', meta, 'opts.maxLenEvents', max_events)
  end

  local answers, failures = {}, 0
  for i = 1, jobs_count do
    inverses = {}
    local succeeded, answer = pcall(add_once, job_at(i))
    if not succeeded then
      undo()
      failures = failures + 1
    end
    answers[i] = answer
  end
  if failures == jobs_count then
    error(answers[1], 0)
  end
  return answers
end

local succeeded, result = pcall(add_jobs)
return succeeded and result or redis.error_reply(result)
