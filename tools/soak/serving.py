"""What the soak programs share: a `hadal serve` of their own, requests and answers over HTTP. Standard library only."""
import json
import math
import signal
import subprocess
import threading
import urllib.error
import urllib.request


class Server:
    """A server on a free port of loopback, up when the constructor returns. Its log lines are in `log`."""

    def __init__(self, hadal, *flags):
        self.process = subprocess.Popen([hadal, "serve", "--port", "0", *flags], stderr=subprocess.PIPE, text=True)
        self.url, self.log = None, []
        for line in self.process.stderr:
            self.log.append(line)
            if " at http" in line:
                self.url = line.split(" at ", 1)[1].split(",")[0]
                break
        if self.url is None:
            raise SystemExit("the server did not start:\n" + "".join(self.log))
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self.reader.start()

    def post(self, path, request, timeout=600):
        """The answer's JSON; None if the server went away."""
        body = urllib.request.Request(self.url + path, json.dumps(request).encode(),
                                      {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(body, timeout=timeout) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{path}: {error.code} {error.read().decode(errors='replace')}") from error
        except (OSError, ValueError):
            return None

    def metric(self, name):
        """A value of /metrics without labels."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as reply:
            for line in reply.read().decode().splitlines():
                if line.startswith(name + " "):
                    return float(line.split()[1])
        raise SystemExit(f"/metrics has no {name}")

    def resident_bytes(self):
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
        return 0

    def trouble(self):
        """Warnings and errors of its log."""
        return [line for line in self.log if " W " in line or " E " in line]

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=120)


def random_tokens(rng, count):
    """Ids that are words, neither special tokens nor single bytes."""
    return [rng.randrange(300, 8000) for _ in range(count)]


def percentile(values, share):
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def mean(values):
    return sum(values) / len(values)
