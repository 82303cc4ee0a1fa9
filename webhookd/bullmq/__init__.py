"""BullMQ's wire format: jobs as BullMQ itself would have written them.

Key names, job options, job ids, and ``add_jobs.lua``, the one script that adds jobs to a queue. The facts are
those of the npm packages bullmq 5.81 and 6.7; the differential tests compare this package with both.
"""
