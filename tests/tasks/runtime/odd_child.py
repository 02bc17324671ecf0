"""A child that does what it is told: answers, hangs, dies, eats memory."""

import os
import signal
import sys
import time

from tasks.runtime.killable import serve


def answer(head: dict, body: bytes) -> dict:
    do = head["do"]
    if do == "hang":
        time.sleep(600)
    elif do == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif do == "exit":
        os._exit(3)
    elif do == "eat":
        try:
            return {"size": len(bytearray(8 << 30))}
        except MemoryError:
            return {"failure": "memory"}
    elif do == "print":
        print("a library that chats on standard output")
        sys.stdout.flush()
    return {"pid": os.getpid(), "length": len(body)}


if __name__ == "__main__":
    serve(answer)
