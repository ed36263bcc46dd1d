/* One pool for the process. Nobody spins: a worker without work waits for a signal. */

#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include "common.h"

enum { MOST_WORKERS = 255 };

static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER; /* held by the thread whose work it is */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;   /* guards what follows */
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER, left = PTHREAD_COND_INITIALIZER;
static pthread_once_t fork_handler = PTHREAD_ONCE_INIT;
static int workers, seats, active; /* threads there are; that may still join; that have joined */
static void (*current)(void *);
static void *current_context;

static void *worker(void *unused) {
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (seats == 0) pthread_cond_wait(&wake, &lock);
        seats--;
        active++;
        void (*work)(void *) = current;
        void *context = current_context;
        pthread_mutex_unlock(&lock);
        work(context);
        pthread_mutex_lock(&lock);
        if (--active == 0) pthread_cond_signal(&left);
    }
    return NULL;
}

/* A child of fork has this thread alone, and perhaps locks of threads that it does not have. */
static void start_afresh(void) {
    pthread_mutex_init(&in_use, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wake, NULL);
    pthread_cond_init(&left, NULL);
    workers = seats = active = 0;
}

static void install_fork_handler(void) { pthread_atfork(NULL, NULL, start_afresh); }

static void hire(int wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads of the host */
    while (workers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, NULL)) break;
        pthread_detach(thread);
        workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void hf_lrq_run(void (*work)(void *), void *context, int threads) {
    if (threads <= 1 || pthread_mutex_trylock(&in_use)) {
        work(context);
        return;
    }
    pthread_once(&fork_handler, install_fork_handler);
    pthread_mutex_lock(&lock);
    hire((int)smaller(threads - 1, MOST_WORKERS));
    seats = (int)smaller(threads - 1, workers);
    current = work;
    current_context = context;
    for (int i = 0; i < seats; i++) pthread_cond_signal(&wake);
    pthread_mutex_unlock(&lock);
    work(context);
    pthread_mutex_lock(&lock);
    seats = 0; /* whoever wakes up only now is too late */
    while (active) pthread_cond_wait(&left, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&in_use);
}
