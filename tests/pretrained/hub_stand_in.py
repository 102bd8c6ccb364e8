"""A stand-in of the Hugging Face hub and of a web server, on localhost.

It answers what huggingface_hub asks: /api/models/NAME/revision/REVISION and
HEAD and GET of /NAME/resolve/REVISION/FILE. Plain files are under /files/.
"""

import contextlib
import hashlib
import http.server
import json
import re
import socket
import threading

import numpy as np
import pytest
from safetensors.numpy import save

from fulllora_jax.core.errors import UserError
from fulllora_jax.pretrained import sources

COMMIT = '5' * 40
REPOSITORY = 'owner/tiny-vit'
WEIGHTS = save({'x': np.arange(20_000, dtype=np.float32)})
CONFIG = b'{"architecture": "vit_tiny"}'


def sha256(content):
  """Returns the hash in hex."""
  return hashlib.sha256(content).hexdigest()


def sharded():
  """Returns name -> bytes of an index and its two shards."""
  weight_map = {'x': 'a.safetensors', 'y': 'b.safetensors'}
  index = json.dumps({'weight_map': weight_map}).encode()
  return {
    'model.safetensors.index.json': index,
    'a.safetensors': save({'x': np.zeros(2)}),
    'b.safetensors': save({'y': np.zeros(2)}),
  }


def refused(source):
  """Fetches what must be refused; returns the one line."""
  with pytest.raises(UserError) as caught:
    sources.fetch(source)
  message = str(caught.value)
  assert '\n' not in message
  assert source in message
  return message


def unreachable():
  """Returns the address of a port that nobody listens at."""
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    return f'http://127.0.0.1:{server.getsockname()[1]}'


class StandIn:
  """What the server has, what goes wrong with it, and what it was asked.

  Attributes:
    repository: name -> bytes, of the files of owner/tiny-vit at COMMIT.
    files: name -> bytes, under /files/.
    cut: name -> bytes after which the next answer breaks off, once.
    ignore_range: sends all of a file whatever range is asked for.
    no_length: leaves out Content-Length for plain files.
    status: of every answer, instead of what it would be.
    body: of the answer about a repository, instead of what it would be.
    asked: (method, path, Range) of every request.
  """

  def __init__(self):
    self.files, self.cut = {'w.safetensors': WEIGHTS}, {}
    self.repository = {
      'config.json': CONFIG,
      'model.safetensors': WEIGHTS,
      'pytorch_model.bin': b'\x80\x02}.',
    }
    self.ignore_range = self.no_length = False
    self.status = self.body = None
    self.asked = []

  def gets(self, name):
    """Returns the ranges of the GETs of one file."""
    return [
      asked_range
      for method, path, asked_range in self.asked
      if method == 'GET' and path.endswith(f'/{name}')
    ]


@contextlib.contextmanager
def serve():
  """Serves until the end of the block; gives (its URL, what it has)."""
  state = StandIn()
  handler = type('Handler', (_Handler,), {'state': state})
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  server.daemon_threads = True
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}', state
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, *args):
    pass

  def handle(self):
    with contextlib.suppress(ConnectionError):  # the client has gone
      super().handle()

  def do_HEAD(self):
    self._answer()

  def do_GET(self):
    self._answer()

  def _answer(self):
    state = self.state
    state.asked.append((self.command, self.path, self.headers['Range']))
    path = self.path.split('?')[0]
    if state.status:
      return self._refuse(state.status)
    if plain := re.fullmatch(r'/files/(.+)', path):
      return self._file(state.files.get(plain[1]), plain[1])
    about = re.fullmatch(r'/api/models/([^/]+/[^/]+)/revision/(.+)', path)
    file = re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path)
    match = about or file
    if not match or match[1] not in (REPOSITORY, 'owner/gated'):
      return self._refuse(404, 'RepoNotFound')
    if match[2] not in ('main', COMMIT):
      return self._refuse(404, 'RevisionNotFound')
    if about:
      return self._about(match[1])
    if match[1] == 'owner/gated':
      return self._refuse(401, 'GatedRepo')
    return self._file(state.repository.get(match[3]), match[3])

  def _about(self, name):
    siblings = [
      {'rfilename': file, 'size': len(content)} for file, content in self.state.repository.items()
    ]
    about = {'id': name, 'sha': COMMIT, 'siblings': siblings}
    body = self.state.body or json.dumps(about).encode()
    self._send(200, body, {'Content-Type': 'application/json'})

  def _refuse(self, status, code=''):
    headers = {'X-Error-Code': code} if code else {}
    self._send(status, b'', {**headers, 'X-Repo-Commit': COMMIT})

  def _file(self, content, name):
    state = self.state
    if content is None:
      return self._refuse(404, 'EntryNotFound')
    start, status, headers = 0, 200, {}
    asked = re.fullmatch(r'bytes=(\d+)-', self.headers['Range'] or '')
    if asked and not state.ignore_range:
      start, status = int(asked[1]), 206
      if start >= len(content):
        return self._refuse(416)
      last = f'{len(content) - 1}/{len(content)}'
      headers['Content-Range'] = f'bytes {start}-{last}'
    headers['ETag'] = f'"{hashlib.sha256(content).hexdigest()}"'
    headers['X-Repo-Commit'] = COMMIT
    limit = state.cut.pop(name, None) if self.command == 'GET' else None
    self._send(status, content[start:], headers, limit)

  def _send(self, status, body, headers, limit=None):
    self.send_response(status)
    for key, value in headers.items():
      self.send_header(key, value)
    if self.state.no_length:
      self.send_header('Connection', 'close')
    else:
      self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(body[:limit])
    if limit is not None or self.state.no_length:
      self.close_connection = True
