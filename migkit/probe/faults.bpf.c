/*
 * One record per page fault, built in the kernel by four tracepoints.
 *
 * The kernel has no tracepoint at a fault's end, so a record stays in the map
 * `pending`, under its thread, until that thread faults again or dies: only then
 * is it certain that no later wake-up belongs to it. Then it goes to the ring buffer.
 *
 * A pending record is written by its own thread (fault, switch-out), by the CPU
 * that wakes it and by the CPU that it is switched in on: these follow each other,
 * so no lock is needed. User space only reads the map and never deletes from it,
 * because an entry that was freed can be another thread's a moment later.
 *
 * The collector sets, with -D: MAX_RANGES, MAX_WATCHES, MAX_THREADS, RING_PAGES, and,
 * when the kernel's symbols are readable, UFFD_START/UFFD_END (handle_userfault) and
 * ENTRY_START/ENTRY_END (asm_exc_page_fault).
 */

/* Flags of a record; the same numbers are in records.py. */
#define FAULT_KERNEL_MODE 1
#define FAULT_EARLY_WAKE 2

/* prev_state, of which two matter: the sleep that handle_userfault takes, and EXIT_DEAD
 * or EXIT_ZOMBIE, the thread's last switch-out. Pre-emption is TASK_REPORT_MAX, 0x100. */
#define TASK_IS_INTERRUPTIBLE 1
#define DEAD 0x30

/* bpf_get_stack's answer starts at __schedule; handle_userfault is the third, the
 * exception's entry the seventh to eleventh where we looked. */
#define STACK_DEPTH 20

enum { LOST_RING_FULL, LOST_MAP_FULL, LOST_COUNTERS };
enum { AWAKE, ASLEEP, WOKEN };

struct fault {
	u64 fault_ns, blocked_ns, woken_ns, running_ns;
	u64 address, ip;
	u32 pid, tid, error_code, flags;
};

struct pending {
	struct fault fault;
	u64 wake_seen_ns;
	u32 sleep;
	u32 closed;
};

struct address_range {
	u64 start, end;
};

struct watch {
	u64 n_ranges;
	struct address_range ranges[MAX_RANGES];
};

BPF_HASH(watches, u32, struct watch, MAX_WATCHES);
BPF_HASH(pending, u32, struct pending, MAX_THREADS);
BPF_RINGBUF_OUTPUT(faults, RING_PAGES);
BPF_ARRAY(lost, u64, LOST_COUNTERS);

static __always_inline void submit(struct fault *fault)
{
	/* No wake-up: the collector looks every few ms, and an irq_work for each
	 * fault would cost the very latency that is measured here. */
	if (faults.ringbuf_output(fault, sizeof(*fault), BPF_RB_NO_WAKEUP))
		lost.atomic_increment(LOST_RING_FULL);
}

static __always_inline bool watched(struct watch *watch, u64 address)
{
	for (int i = 0; i < MAX_RANGES; i++) {
		if (i >= watch->n_ranges)
			return false;
		if (address >= watch->ranges[i].start && address < watch->ranges[i].end)
			return true;
	}
	return false;
}

static __always_inline struct pending *add_thread(u32 tid)
{
	struct pending fresh = {.fault = {.tid = tid}};

	if (pending.update(&tid, &fresh)) {
		lost.atomic_increment(LOST_MAP_FULL);
		return NULL;
	}
	return pending.lookup(&tid);
}

static __always_inline int on_fault(u64 address, u64 ip, u64 error_code, u32 flags)
{
	u64 id = bpf_get_current_pid_tgid();
	u32 pid = id >> 32, tid = id;

	struct watch *watch = watches.lookup(&pid);
	if (!watch)
		return 0;
	struct pending *entry = pending.lookup(&tid);
	if (!watched(watch, address)) {
		/* Its sleep would otherwise be taken for the earlier fault's. */
		if (entry)
			entry->closed = 1;
		return 0;
	}
	if (entry)
		submit(&entry->fault);
	else
		entry = add_thread(tid);
	if (!entry)
		return 0;
	/* Field by field, not by a struct made on the stack: 100 ns less. */
	entry->fault.fault_ns = bpf_ktime_get_ns();
	entry->fault.blocked_ns = 0;
	entry->fault.woken_ns = 0;
	entry->fault.running_ns = 0;
	entry->fault.address = address;
	entry->fault.ip = ip;
	entry->fault.pid = pid;
	entry->fault.error_code = error_code;
	entry->fault.flags = flags;
	entry->wake_seen_ns = 0;
	entry->sleep = AWAKE;
	entry->closed = 0;
	return 0;
}

TRACEPOINT_PROBE(exceptions, page_fault_user)
{
	return on_fault(args->address, args->ip, args->error_code, 0);
}

TRACEPOINT_PROBE(exceptions, page_fault_kernel)
{
	return on_fault(args->address, args->ip, args->error_code, FAULT_KERNEL_MODE);
}

/*
 * Does the current thread sleep for this fault? A sleep of its ordinary life after it
 * must not touch the record.
 *
 * handle_userfault waits in TASK_INTERRUPTIBLE when it was called from an exception,
 * and nothing else on that path does (locks, memory, disks: uninterruptible). What
 * is left to know is whether the thread is still in that exception. After a user-mode
 * fault its registers on entry to the kernel tell: they still point to the faulting
 * instruction, and orig_ax is -1 where a system call has its number. (x86-64's struct
 * pt_regs never changes, user space has it too.) To walk the stack instead takes 2 us, a
 * tenth of a fault's latency.
 *
 * A fault inside a system call shows the system call's registers, so there the stack
 * decides: handle_userfault, called by way of an exception (get_user_pages, as in mlock,
 * calls it without one). Without symbols: the first sleep counts.
 */
static __always_inline bool in_fault_stack(void *ctx, struct fault *fault)
{
#ifdef UFFD_START
	u64 stack[STACK_DEPTH];
	long size = bpf_get_stack(ctx, stack, sizeof(stack), 0);
	bool in_uffd = false;

	for (int i = 0; i < STACK_DEPTH; i++) {
		if ((i + 1) * (long)sizeof(u64) > size)
			return false;
		if (stack[i] > UFFD_START && stack[i] < UFFD_END)
			in_uffd = true;
		if (in_uffd && stack[i] > ENTRY_START && stack[i] < ENTRY_END)
			return true;
	}
	return false;
#else
	return fault->blocked_ns == 0;
#endif
}

static __always_inline bool sleeps_in_fault(void *ctx, struct fault *fault, long state)
{
	u64 registers, orig_ax, user_ip;

	if (state != TASK_IS_INTERRUPTIBLE)
		return false;
	if (fault->flags & FAULT_KERNEL_MODE)
		return in_fault_stack(ctx, fault);
	registers = bpf_task_pt_regs((void *)bpf_get_current_task_btf());
	/* Assembly, since a compiler may merge C's loads with loads through another kind
	 * of pointer, which the verifier refuses. */
	asm volatile("%0 = *(u64 *)(%1 + 15 * 8)" : "=r"(orig_ax) : "r"(registers));
	asm volatile("%0 = *(u64 *)(%1 + 16 * 8)" : "=r"(user_ip) : "r"(registers));
	return orig_ax == -1ULL && user_ip == fault->ip;
}

static __always_inline void switched_out(void *ctx, u32 tid, long state)
{
	struct pending *entry = pending.lookup(&tid);

	if (!entry)
		return;
	if (state & DEAD) {
		submit(&entry->fault);
		pending.delete(&tid);
	} else if (!entry->closed && sleeps_in_fault(ctx, &entry->fault, state)) {
		if (!entry->fault.blocked_ns)
			entry->fault.blocked_ns = bpf_ktime_get_ns();
		entry->sleep = ASLEEP;
	}
}

static __always_inline void switched_in(u32 tid)
{
	struct pending *entry = pending.lookup(&tid);

	if (!entry || entry->sleep == AWAKE)
		return;
	if (entry->sleep == ASLEEP) {
		/* Woken while on its way to sleep: the waker's tracepoint ran before
		 * our switch-out. The wake-up took effect when the sleep began. */
		entry->fault.woken_ns = entry->wake_seen_ns > entry->fault.blocked_ns
						? entry->wake_seen_ns
						: entry->fault.blocked_ns;
		entry->fault.flags |= FAULT_EARLY_WAKE;
	}
	entry->fault.running_ns = bpf_ktime_get_ns();
	entry->sleep = AWAKE;
}

TRACEPOINT_PROBE(sched, sched_switch)
{
	long state = args->prev_state;

	if (args->prev_pid && (state & (TASK_IS_INTERRUPTIBLE | DEAD)))
		switched_out(args, args->prev_pid, state);
	if (args->next_pid)
		switched_in(args->next_pid);
	return 0;
}

TRACEPOINT_PROBE(sched, sched_waking)
{
	u32 tid = args->pid;
	struct pending *entry = pending.lookup(&tid);

	if (!entry)
		return 0;
	entry->wake_seen_ns = bpf_ktime_get_ns();
	if (entry->sleep != AWAKE) {
		entry->fault.woken_ns = entry->wake_seen_ns;
		entry->sleep = WOKEN;
	}
	return 0;
}
