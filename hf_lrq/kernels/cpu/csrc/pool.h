/* Threads that sleep until there is work. */

#ifndef HF_LRQ_POOL_H
#define HF_LRQ_POOL_H

/* Runs work(context) in this thread and in up to `threads` - 1 others at once; returns when all have left it. `work`
   must share out its parts itself and be right if only one thread comes. When the pool is in use, or a thread cannot be
   made, fewer come. */
void hf_lrq_run(void (*work)(void *), void *context, int threads);

#endif
