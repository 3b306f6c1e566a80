// Threads to work with: those of the OpenMP runtime that torch has loaded, or a pool of our own.
//
// After each of torch's operators its threads stay awake for some milliseconds, waiting for the next one. A pool beside
// them would fight them for the cores; sharing them, work begins at once. But an OpenMP region ends when its last thread
// does, and on a busy machine one may not get a core for milliseconds. Our pool waits only for threads that took a piece:
// there a call costs what it costs on one thread. So the shared threads are used until a region ends late, and then left
// alone for a while.
#include "pool.hpp"

#include <pthread.h>
#if defined(__linux__)
#include <dlfcn.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace foveate {
namespace {

using Clock = std::chrono::steady_clock;

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
    std::mutex busy;  // held by the one caller that uses other threads; a second one works alone
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

// The two entries of GCC's OpenMP runtime that are needed; null where torch brought another one, or none.
struct Team {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*inside)() = nullptr;
    Clock::time_point rested{};  // until then it is left alone; guarded by Pool::busy

    bool is_free() const { return parallel && !inside() && Clock::now() >= rested; }

    void run(Job& job, int threads) {
        struct Region {
            Job* job;
            std::atomic<int64_t> drained;
        } region{&job, {0}};
        const Clock::time_point begun = Clock::now();
        parallel(
            [](void* data) {
                Region& mine = *static_cast<Region*>(data);
                mine.job->drain();
                int64_t none = 0;
                mine.drained.compare_exchange_strong(none, Clock::now().time_since_epoch().count());
            },
            &region, static_cast<unsigned>(threads), 0);
        // Between the first thread that found nothing left and the last there is at most a piece of work, on idle cores.
        const Clock::time_point ended = Clock::now();
        const auto late = ended.time_since_epoch() - Clock::duration(region.drained.load());
        constexpr auto patience = std::chrono::milliseconds(2), rest = std::chrono::milliseconds(200);
        if (late > patience && late > (ended - begun) / 4) rested = ended + rest;
    }
};

// Never destroyed: its threads outlive every static object. A forked child has none of them and starts anew, and it may
// not use those of OpenMP, which are gone too.
Pool* pool = nullptr;
Team team;
std::once_flag registered;
std::mutex making;

Pool& the_pool() {
    // `making` is held across a fork, or a child could inherit it locked by a thread that it does not have.
    std::call_once(registered, [] {
        pthread_atfork([] { making.lock(); }, [] { making.unlock(); },
                       [] {
                           pool = nullptr;
                           team = Team{};
                           making.unlock();
                       });
    });
    std::lock_guard<std::mutex> lock(making);
    if (!pool) pool = new Pool;
    return *pool;
}

}  // namespace

bool share_threads_of(const char* library) {
#if defined(__linux__)
    void* loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (!loaded) return false;
    void *parallel = dlsym(loaded, "GOMP_parallel"), *inside = dlsym(loaded, "omp_in_parallel");
    if (!parallel || !inside) return false;
    Pool& shared = the_pool();
    std::lock_guard<std::mutex> lock(shared.busy);
    team.parallel = reinterpret_cast<decltype(team.parallel)>(parallel);
    team.inside = reinterpret_cast<decltype(team.inside)>(inside);
    return true;
#else
    (void)library;
    return false;
#endif
}

void spread_over(int threads, int64_t count, void (*work)(void*, int64_t), void* context) {
    Job job{work, context, count, threads - 1};
    if (threads > 1 && count > 1) {
        Pool& shared = the_pool();
        if (std::unique_lock<std::mutex> turn(shared.busy, std::try_to_lock); turn) {
            if (team.is_free())
                team.run(job, threads);
            else
                shared.run(job, threads - 1);
            return;
        }
    }
    job.drain();
}

}  // namespace foveate
