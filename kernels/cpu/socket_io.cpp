// Blocks straight from an arena into a socket, and from a socket into an arena, as far as the socket goes without waiting.
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>

#include "xxh3.h"

namespace {

constexpr int kVectors = 64;
// Of one system call: acknowledgements that come during it wait for its end, so with many of these bytes the peer is served in gusts.
constexpr int64_t kChunk = 384 << 10;
constexpr int64_t kEnded = INT64_MIN;  // the peer will send nothing more

bool would_wait(int error) { return error == EAGAIN || error == EWOULDBLOCK; }

}  // namespace

extern "C" {

// Sends, from byte `position` on and at most `limit` (at least 1) bytes, the `head_bytes` at head and then the `num` blocks of `bytes`
// bytes at memory + ids[i] * stride. Returns how many went: 0 if the socket takes none now, -errno if it failed before the first.
__attribute__((visibility("default"))) int64_t tandem_send_blocks(int32_t fd, const char* head, int64_t head_bytes, const char* memory,
                                                                  int64_t stride, const int64_t* ids, int64_t num, int64_t bytes,
                                                                  int64_t position, int64_t limit) {
  const int64_t end = std::min(head_bytes + num * bytes, position + limit);
  int64_t at = position;
  while (at < end) {
    iovec vectors[kVectors];
    int count = 0;
    const int64_t stop = std::min(end, at + kChunk);
    for (int64_t next = at; next < stop && count < kVectors; count++) {
      const char* from = head + next;
      int64_t size = std::min(head_bytes, stop) - next;
      if (next >= head_bytes) {
        const int64_t block = (next - head_bytes) / bytes, offset = (next - head_bytes) % bytes;
        from = memory + ids[block] * stride + offset;
        size = std::min(bytes - offset, stop - next);
      }
      vectors[count].iov_base = const_cast<char*>(from);
      vectors[count].iov_len = (size_t)size;
      next += size;
    }
    msghdr message{};
    message.msg_iov = vectors;
    message.msg_iovlen = (size_t)count;
    const int64_t sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
      const int error = errno;
      if (error == EINTR) continue;
      if (at > position || would_wait(error)) break;  // an error comes again
      return -error;
    }
    at += sent;
  }
  return at - position;
}

// Receives, from byte `position` on and at most `limit` (at least 1) bytes, the `num` blocks of `bytes` (at least 241) bytes to
// memory + ids[i] * stride. The XXH3-64 of each block that becomes complete goes to checksums[i], while it is warm in the cache.
// Returns how many came: 0 if none is there now, kEnded or -errno if the stream ended or failed before the first.
__attribute__((visibility("default"))) int64_t tandem_receive_blocks(int32_t fd, char* memory, int64_t stride, const int64_t* ids,
                                                                     int64_t num, int64_t bytes, int64_t position, int64_t limit,
                                                                     uint64_t* checksums) {
  const int64_t end = std::min(num * bytes, position + limit);
  int64_t at = position;
  while (at < end) {
    const int64_t block = at / bytes, offset = at % bytes;
    char* to = memory + ids[block] * stride;
    const int64_t got = recv(fd, to + offset, (size_t)std::min(bytes - offset, end - at), MSG_DONTWAIT);
    if (got <= 0) {
      const int error = got < 0 ? errno : 0;
      if (error == EINTR) continue;
      if (at > position || would_wait(error)) break;
      return error ? -error : kEnded;
    }
    at += got;
    if (offset + got == bytes) checksums[block] = tandem::xxh3::pass<tandem::xxh3::Keep::kNothing>(to, nullptr, bytes);
  }
  return at - position;
}

}  // extern "C"
