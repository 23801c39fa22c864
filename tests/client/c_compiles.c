/* The header is C, and a C program links with the library: built by the tests as C11, pedantic. */
#include "client/libstillframe.h"

int stillframe_c_compiles(void);

int stillframe_c_compiles(void) {
  sf_error error = {0};
  sf_attach_options options = {0};
  sf_session* session = NULL;
  char* json = NULL;
  options.struct_bytes = (uint32_t)sizeof options;
  if (sf_attach(&options, &session, &error) != SF_INVALID_ARGUMENT) return 1;
  if (session != NULL || error.code != SF_INVALID_ARGUMENT || error.message[0] == '\0') return 2;
  if (sf_run_list("/nonexistent/run", &json, &error) != SF_OK) return 3;
  if (json == NULL || json[0] != '[' || json[1] != ']') return 4;
  sf_free(json);
  return sf_session_close(NULL, 0, NULL);
}
