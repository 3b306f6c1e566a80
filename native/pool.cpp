// The caller works too, and at the end waits only for threads that took a piece: on a busy machine, where the others may
// not get a core for milliseconds, a call costs what it costs on one thread. A barrier would wait for all of them.
#include "pool.hpp"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace foveate {
namespace {

struct Job {
    void (*work)(void*, int64_t);
    void* context;
    int64_t count;
    int seats;  // how many more threads may join
    std::atomic<int64_t> next{0};

    void drain() {
        for (int64_t at; (at = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(context, at);
    }
};

struct Pool {
    std::mutex busy;  // held by the one caller that uses the pool; a second one works alone
    std::mutex guard;
    std::condition_variable offered, left;
    Job* job = nullptr;
    int inside = 0, started = 0;

    void serve() {
        std::unique_lock<std::mutex> lock(guard);
        for (;;) {
            offered.wait(lock, [this] { return job && job->seats > 0; });
            Job* mine = job;
            --mine->seats;
            ++inside;
            lock.unlock();
            mine->drain();
            lock.lock();
            --inside;
            left.notify_one();
        }
    }

    void run(Job& given, int helpers) {
        {
            std::lock_guard<std::mutex> lock(guard);
            for (; started < helpers; ++started) std::thread(&Pool::serve, this).detach();
            job = &given;
        }
        offered.notify_all();
        given.drain();
        std::unique_lock<std::mutex> lock(guard);
        job = nullptr;
        left.wait(lock, [this] { return inside == 0; });
    }
};

// Never destroyed: its threads outlive every static object. A forked child has none of them and starts anew.
Pool* pool = nullptr;
std::once_flag registered;
std::mutex making;

Pool& the_pool() {
    // `making` is held across a fork, or a child could inherit it locked by a thread that it does not have.
    std::call_once(registered, [] {
        pthread_atfork([] { making.lock(); }, [] { making.unlock(); },
                       [] {
                           pool = nullptr;
                           making.unlock();
                       });
    });
    std::lock_guard<std::mutex> lock(making);
    if (!pool) pool = new Pool;
    return *pool;
}

}  // namespace

void spread_over(int threads, int64_t count, void (*work)(void*, int64_t), void* context) {
    Job job{work, context, count, threads - 1};
    if (threads > 1 && count > 1) {
        Pool& shared = the_pool();
        if (std::unique_lock<std::mutex> turn(shared.busy, std::try_to_lock); turn) {
            shared.run(job, threads - 1);
            return;
        }
    }
    job.drain();
}

}  // namespace foveate
