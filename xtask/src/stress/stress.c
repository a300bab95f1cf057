/* Floats, long jumps, signals and threads; says "ok" or what is wrong. */
#define _GNU_SOURCE
#include <fenv.h>
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

static int bad;
#define CHECK(x) do { if (!(x)) { printf("line %d: %s\n", __LINE__, #x); bad = 1; } } while (0)

static void floats(void)
{
	volatile double one = 1, three = 3, big = 1e300;
	CHECK(one / three * three == 1.0);
	feclearexcept(FE_ALL_EXCEPT);
	volatile double r = big * big;
	CHECK(isinf(r) && fetestexcept(FE_OVERFLOW));
	fesetround(FE_UPWARD);
	volatile float up = (float)one / (float)three;
	fesetround(FE_DOWNWARD);
	volatile float down = (float)one / (float)three;
	fesetround(FE_TONEAREST);
	CHECK(up > down && nextafterf(down, 1) == up);
	volatile long double l = 1.0L;
	CHECK(l + LDBL_EPSILON != 1.0L && l + LDBL_EPSILON / 2 == 1.0L);
	double sum = 0;
	for (int i = 1; i <= 1000000; i++)
		sum += 1.0 / ((double)i * i);
	CHECK(fabs(sum - 1.6449330668487265) < 1e-12);
	CHECK(lrint(2.5) == 2 && lrint(3.5) == 4 && llround(-2.5) == -3);
	CHECK(fma(1e16, 1e-16, -1.0) != 5.0 && sinl(1.0L) > 0.8414709848L);
	float v[1024];
	for (int i = 0; i < 1024; i++)
		v[i] = i * 0.5f;
	float dot = 0;
	for (int i = 0; i < 1024; i++)
		dot += v[i] * 2.0f;
	CHECK(dot == 523776.0f);
}

static int deep(int n, jmp_buf *out)
{
	volatile double keep = n * 1.5;
	if (n == 0)
		longjmp(*out, 77);
	return deep(n - 1, out) + (int)keep;
}

static void jumps(void)
{
	for (volatile int i = 0; i < 2000; i++) {
		jmp_buf buf;
		int got = setjmp(buf);
		if (got == 0)
			deep(i % 100, &buf);
		CHECK(got == 77);
	}
}

static sigjmp_buf on_fault;
static volatile sig_atomic_t ticks, chld;
static void *volatile fault_at;

static void fault(int sig, siginfo_t *info, void *context)
{
	(void)context;
	fault_at = info->si_addr;
	siglongjmp(on_fault, sig);
}

static void skip(int sig, siginfo_t *info, void *context)
{
	(void)sig;
	(void)info;
	((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 2;
	ticks++;
}

static void tick(int sig) { (void)sig; ticks++; }
static void child_ended(int sig) { (void)sig; chld++; }

static void handle(int sig, void (*f)(int, siginfo_t *, void *))
{
	struct sigaction a = { .sa_sigaction = f, .sa_flags = SA_SIGINFO | SA_NODEFER };
	sigaction(sig, &a, NULL);
}

static void signals(void)
{
	handle(SIGSEGV, fault);
	handle(SIGFPE, fault);
	char *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	mprotect(page + 4096, 4096, PROT_NONE);
	for (volatile int i = 0; i < 2000; i++) {
		volatile int got = sigsetjmp(on_fault, 1);
		if (got == 0)
			*(volatile uint64_t *)(page + 4096 - 4) = 1;
		CHECK(got == SIGSEGV && fault_at == page + 4096);
		got = sigsetjmp(on_fault, 1);
		volatile int zero = 0;
		if (got == 0)
			zero = 5 / zero;
		CHECK(got == SIGFPE);
	}
	handle(SIGILL, skip);
	ticks = 0;
	for (int i = 0; i < 1000; i++)
		__asm__ volatile("ud2");
	CHECK(ticks == 1000);
	signal(SIGALRM, tick);
	ticks = 0;
	struct itimerval every = { { 0, 2000 }, { 0, 2000 } }, never = { { 0, 0 }, { 0, 0 } };
	setitimer(ITIMER_REAL, &every, NULL);
	volatile double x = 1;
	uint64_t a = 1, b = 1;
	while (ticks < 100) {
		for (int i = 0; i < 10000; i++) {
			x = x * 1.0000001 + 0.5;
			x = x / 1.0000001 - 0.5 / 1.0000001;
			a = a * 6364136223846793005u + 1;
			b = b * 6364136223846793005u + 1;
		}
		CHECK(a == b && fabs(x - 1) < 1e-3);
	}
	setitimer(ITIMER_REAL, &never, NULL);
	signal(SIGCHLD, child_ended);
	for (int i = 0; i < 100; i++) {
		pid_t pid = fork();
		if (pid == 0)
			_exit(i);
		int status = -1;
		while (waitpid(pid, &status, 0) != pid)
			;
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == i);
	}
	CHECK(chld > 0);
	munmap(page, 8192);
}

enum { THREADS = 4, ROUNDS = 100000 };
static atomic_long counter;
static long guarded;
static unsigned char bytes[64];
static __int128 wide;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_barrier_t barrier;

static void *work(void *argument)
{
	long me = (long)argument;
	double sum = 0;
	for (int i = 0; i < ROUNDS; i++) {
		atomic_fetch_add(&counter, 1);
		bytes[me]++;
		__atomic_fetch_xor(&bytes[32], (unsigned char)(1 << me), __ATOMIC_SEQ_CST);
		if (i % 16 == 0) {
			pthread_mutex_lock(&lock);
			guarded++;
			wide += 3;
			pthread_mutex_unlock(&lock);
		}
		sum += sqrt(i) * me;
	}
	pthread_barrier_wait(&barrier);
	return (void *)(long)(sum / 1000);
}

static void threads(void)
{
	pthread_t t[THREADS];
	pthread_barrier_init(&barrier, NULL, THREADS);
	for (long i = 0; i < THREADS; i++)
		pthread_create(&t[i], NULL, work, (void *)i);
	for (long i = 0; i < THREADS; i++) {
		void *got;
		pthread_join(t[i], &got);
		CHECK(labs((long)got - i * 21081) < i + 1);
	}
	CHECK(counter == THREADS * ROUNDS && guarded == THREADS * ROUNDS / 16);
	CHECK(wide == (__int128)guarded * 3 && bytes[32] == 0);
	for (int i = 0; i < THREADS; i++)
		CHECK(bytes[i] == (unsigned char)ROUNDS);
	for (int i = 0; i < 200; i++) {
		void *got;
		pthread_t one;
		pthread_barrier_init(&barrier, NULL, 1);
		CHECK(pthread_create(&one, NULL, (void *(*)(void *))(void *)abs, (void *)-5L) == 0);
		pthread_join(one, &got);
		CHECK((int)(long)got == 5);
	}
}

static void generated_code(void)
{
	unsigned char *code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
				   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (int i = 0; i < 5000; i++) {
		unsigned char text[] = { 0xb8, (unsigned char)i, (unsigned char)(i >> 8), 0, 0, 0xc3 };
		memcpy(code + i % 8 * 16, text, sizeof text);
		CHECK(((int (*)(void))(void *)(code + i % 8 * 16))() == i);
	}
	munmap(code, 4096);
}

int main(void)
{
	floats();
	jumps();
	signals();
	threads();
	generated_code();
	if (!bad)
		printf("ok\n");
	return bad;
}
